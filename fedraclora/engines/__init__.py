"""Engines: where the clients of a cohort run. Each is a Flower `Grid`."""
