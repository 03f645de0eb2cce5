"""Base weights on their way: files, the chain of links, copies at workers and clients."""
