"""Figures, made from ledger rows; the only package that knows matplotlib."""

from __future__ import annotations

from fedraclora.plots.axes import MEGABYTE, write_png
from fedraclora.plots.bounds import Measured, Panel, bounds_figure
from fedraclora.plots.comparison import compare_figure
from fedraclora.plots.leaderboard import Entrant, leaderboard_figure
from fedraclora.plots.partition import label_distribution
from fedraclora.plots.run import curves, figure_of

__all__ = [
    "MEGABYTE",
    "Entrant",
    "Measured",
    "Panel",
    "bounds_figure",
    "compare_figure",
    "curves",
    "figure_of",
    "label_distribution",
    "leaderboard_figure",
    "write_png",
]
