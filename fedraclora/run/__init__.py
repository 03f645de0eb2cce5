"""What a run writes and reads back: ledger, checkpoints, folder, what clients keep."""
