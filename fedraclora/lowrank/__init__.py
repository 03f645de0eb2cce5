"""Compute low-rank algebra on matrices, and view every kind of layer as a matrix."""
