"""Figure of a leaderboard: what methods reach, and what they send for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedraclora.plots.axes import COLOURS, label_axes, make_logarithmic, new_figure, write_png


@dataclass(frozen=True)
class Entrant:
    """A method of a leaderboard.

    Attributes:
        label: Its name.
        mean, spread: The metric over the seeds; a spread of NaN is not drawn.
        uplink: MB that all clients sent.
        exact: Whether its aggregation is exact.
    """

    label: str
    mean: float
    spread: float
    uplink: float
    exact: bool


def leaderboard_figure(entrants: Sequence[Entrant], metric: str, path: Path) -> None:
    """Draw the metric of each method, and the metric against its uplink, by place on the board.

    Args:
        entrants: The best first.
        metric: Its name.
        path: The PNG to write.
    """
    figure = new_figure(13, max(4.5, 0.32 * len(entrants) + 1.5))
    figure.suptitle(f"{metric} at the end: mean and standard deviation over seeds", fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    for place, entrant in enumerate(entrants):
        spread = entrant.spread if math.isfinite(entrant.spread) else 0.0
        # Shape and colour, so that the kinds are told apart without colours too.
        look = {"color": COLOURS[0 if entrant.exact else 1], "fmt": "o" if entrant.exact else "s"}
        kind = "exact" if entrant.exact else "not exact"
        left.errorbar(entrant.mean, place, xerr=spread, capsize=3, label=kind, **look)
        right.errorbar(entrant.uplink, entrant.mean, yerr=spread, capsize=3, **look)
        right.annotate(
            str(place + 1),
            (entrant.uplink, entrant.mean),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
        )
    names = [f"{entrant.label}  {place + 1}" for place, entrant in enumerate(entrants)]
    left.set_yticks(range(len(entrants)), names, fontsize=9)
    left.invert_yaxis()
    label_axes(left, metric, "")
    kinds = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    figure.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=2, frameon=False)
    label_axes(right, "uplink of all clients (MB)", metric)
    make_logarithmic(right, "x")
    write_png(figure, path)
