"""Engines: where the clients of a cohort run. Each has a `Grid`, which is asked and answers."""
