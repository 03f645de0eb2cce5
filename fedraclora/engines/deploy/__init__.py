"""Run clients on real SuperLinks and SuperNodes."""
