"""``fedraclora report``: what runs were and what came of them, in one HTML file."""

from experiments.report.command import main

__all__ = ["main"]
