"""Measure models on held-out samples."""
