"""Downlinks and uplinks as Flower records, and the count of their bytes."""
