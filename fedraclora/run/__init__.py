"""Write and read the files of a run: ledger, checkpoints, folder, client state."""
