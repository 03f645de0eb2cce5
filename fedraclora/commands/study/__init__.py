"""Studies: rows of a table tuned alike, run over seeds, and ranked."""
