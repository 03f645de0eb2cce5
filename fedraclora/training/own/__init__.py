"""Run a training function of the user's: its inputs, its outputs and their checks."""
