"""Files of a run, written and read back: ledger, checkpoints, folder, client state."""
