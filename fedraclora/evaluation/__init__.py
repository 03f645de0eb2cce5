"""Measuring models on held-out samples."""
