"""Figure of a leaderboard: what methods reach, and what they send for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fedraclora.plots.axes import COLOURS, label_axes, make_logarithmic, new_figure, write_png

BELOW = 4.5  # height of the metric against uplink, inches
LABEL_HEIGHT = 0.14  # of the number beside a point, inches
WILD = 20  # times the median spread: of a method of which a seed broke down
CARETDOWN = 7  # a marker of matplotlib


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

    A method of which a seed broke down does not stretch the axes: what lies outside stands at their
    lower end, with its figures.

    Args:
        entrants: The best first.
        metric: Its name.
        path: The PNG to write.
    """
    # One above the other, since a page may be narrow.
    heights = max(2.0, 0.24 * len(entrants) + 0.6), BELOW
    figure = new_figure(7.5, sum(heights) + 0.8)
    figure.suptitle(f"{metric} at the end: mean and standard deviation over seeds", fontsize=12)
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    low, high = spanned(entrants)
    upper.set_xlim(low, high)
    lower.set_ylim(low, high)
    for place, entrant in enumerate(entrants):
        spread = entrant.spread if math.isfinite(entrant.spread) else 0.0
        # Shape and colour, so that the kinds are told apart without colours too.
        look = {"color": COLOURS[0 if entrant.exact else 1], "fmt": "o" if entrant.exact else "s"}
        kind = "exact" if entrant.exact else "not exact"
        if entrant.mean < low:
            text = {"va": "center", "fontsize": 9, "color": look["color"]}
            upper.annotate(f" ← {entrant.mean:.3g} ± {spread:.2g}", (low, place), **text)
            lower.plot(entrant.uplink, low, marker=CARETDOWN, color=look["color"], clip_on=False)
            continue
        upper.errorbar(entrant.mean, place, xerr=spread, capsize=3, label=kind, **look)
        lower.errorbar(entrant.uplink, entrant.mean, yerr=spread, capsize=3, **look)
    near = (high - low) * LABEL_HEIGHT / (BELOW - 0.8)
    for entrant, places in clusters(entrants, near):
        lower.annotate(
            places,
            (entrant.uplink, max(entrant.mean, low)),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
        )
    names = [f"{entrant.label}  {place + 1}" for place, entrant in enumerate(entrants)]
    upper.set_yticks(range(len(entrants)), names, fontsize=9)
    upper.invert_yaxis()
    label_axes(upper, metric, "")
    kinds = dict(zip(*reversed(upper.get_legend_handles_labels()), strict=True))
    figure.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=2, frameon=False)
    label_axes(lower, "uplink of all clients (MB)", metric)
    make_logarithmic(lower, "x")
    write_png(figure, path)


def spanned(entrants: Sequence[Entrant]) -> tuple[float, float]:
    """Choose the range of the metric that is drawn, with a margin.

    It is that of the means and spreads of all, but for those whose spread is more than `WILD` times
    what is usual on the board.
    """
    spreads = [e.spread for e in entrants if math.isfinite(e.spread) and e.spread > 0]
    most = WILD * median(spreads) if spreads else math.inf
    found = [(e.mean, e.spread if e.spread > 0 else 0.0) for e in entrants if not e.spread > most]
    low, high = min(m - d for m, d in found), max(m + d for m, d in found)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def clusters(entrants: Sequence[Entrant], near: float) -> list[tuple[Entrant, str]]:
    """Choose the points that want a label of their own, and the places near each of them.

    Args:
        entrants: The best first.
        near: Points of about the same uplink whose means differ by no more share a label, such as
            "5, 6, 8-13"; their own would stand one over the other.
    """
    found: list[tuple[Entrant, list[int]]] = []
    for place, entrant in enumerate(entrants, 1):
        for first, places in found:
            alike = math.isclose(first.uplink, entrant.uplink, rel_tol=0.1)
            if alike and abs(first.mean - entrant.mean) <= near:
                places.append(place)
                break
        else:
            found.append((entrant, [place]))
    return [(first, _ranges(places)) for first, places in found]


def _ranges(places: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    short = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(short)
