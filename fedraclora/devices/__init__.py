"""Simulate mixed devices on a virtual clock.

`distributions` defines how devices differ and when clients are available, `timeline` runs one
round, and `system` combines the two for the rounds of a run.
"""
