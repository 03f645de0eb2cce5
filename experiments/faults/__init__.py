"""Faults of a deployment, in this process and with real ones."""
