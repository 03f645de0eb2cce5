"""Turn a source's rows into tensors; new rows are encoded in the same way."""
