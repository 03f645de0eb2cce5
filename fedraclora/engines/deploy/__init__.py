"""Real SuperLinks and SuperNodes."""
