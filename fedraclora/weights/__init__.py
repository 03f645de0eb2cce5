"""Store base weights: files, the sequence of merges, and copies at workers and clients."""
