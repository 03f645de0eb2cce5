"""Comparisons: methods run alike, and runs that are there, in one table and one figure."""
