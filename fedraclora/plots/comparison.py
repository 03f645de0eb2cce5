"""Draw figures of several runs: a metric against its cost, and curves beside their bounds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedraclora.plots.axes import (
    COLOURS,
    MEGABYTE,
    Values,
    label_axes,
    make_logarithmic,
    marker,
    new_figure,
    new_panels,
    write_png,
)
from fedraclora.plots.palette import LineStyle, line_styles

POSITIONS = {  # of a curve: column, title, and what one unit of it is
    "round": ("round", 1.0),
    "uplink": ("uplink of all clients so far (MB)", MEGABYTE),
    "traffic": ("uplink + downlink with catch-up so far (MB)", MEGABYTE),
    "seconds": ("seconds of rounds so far", 1.0),
    "virtual_seconds": ("virtual seconds so far", 1.0),
}
BELOW = 4.5  # height of the metric against uplink, inches
LABEL_HEIGHT = 0.14  # of the number beside a point, inches
WILD = 20  # times the median spread: of a method of which a seed broke down
CARETDOWN = 7  # a marker of matplotlib
SHAPES = {True: "o", False: "s"}  # of a method on a leaderboard: whether its aggregation is exact


def compare_figure(
    curves: Mapping[str, Mapping[str, Values]],
    metric: str,
    path: Path,
    *,
    methods: Mapping[str, str],
    against: Collection[str] = tuple(POSITIONS),
) -> None:
    """Draw a metric against rounds, uplink, all traffic and time, one line per group of runs.

    Time is wall-clock time, time of the virtual clock, or both, as the runs have them.

    A line is the mean over the group's runs (seeds) at the rounds that all of them measured; the
    band spans their smallest and largest values. The first fifth of the lines does not extend the
    metric's axis: if that would halve the room of the rest, these lines start at its edge.

    Args:
        curves: By label, the columns of a mean curve (``statistics.mean_curve``): those of
            `POSITIONS`, ``value``, ``least``, ``greatest`` and ``runs``.
        metric: Its name.
        path: The PNG to write.
        methods: The method of each curve, by label: it decides the color.
        against: Those of `POSITIONS` that get a panel, if a run has them.
    """
    labels = [fill(label, 75) for label in curves]
    legend_columns = max(1, min(len(curves), 85 // (max(map(len, labels), default=0) + 8)))
    legend_rows = math.ceil(len("\n".join(labels).splitlines()) / legend_columns)
    drawn = [key for key in POSITIONS if key in against]
    known = [k for k in drawn if any(np.isfinite(curve[k]).any() for curve in curves.values())]
    styles = line_styles([methods[label] for label in curves])
    columns = 2  # of a page that may be narrow: the texts of more would be too small there
    lines_of_panels = math.ceil(len(known) / columns)
    figure = new_figure(7.5, 3.0 * lines_of_panels + 0.24 * legend_rows + 0.1)
    figure.suptitle(f"{metric}: mean over seeds, band from least to greatest", fontsize=12)
    panels = new_panels(figure, lines_of_panels, columns, len(known), sharey=True)
    for place, (panel, key) in enumerate(zip(panels, known, strict=True)):
        title, unit = POSITIONS[key]
        for look, curve in zip(styles, curves.values(), strict=True):
            _draw_mean(panel, np.asarray(curve[key]) / unit, curve, look, log=unit == MEGABYTE)
        label_axes(panel, title, "" if place % columns else metric)
        if unit == MEGABYTE:
            make_logarithmic(panel, "x")
    spans = [(np.asarray(c["least"]), np.asarray(c["greatest"])) for c in curves.values()]
    panels[0].set_ylim(*_span(spans))  # all share it
    lines = panels[0].get_lines()
    figure.legend(lines, labels, loc="outside lower center", ncols=legend_columns, frameon=False)
    write_png(figure, path)


def _draw_mean(
    panel: Axes, x: Values, curve: Mapping[str, Values], look: LineStyle, *, log: bool
) -> None:
    color, dash = look
    x = np.where(log & (x <= 0), np.nan, x)  # no place on a logarithmic axis
    panel.plot(x, curve["value"], dash, color=color, marker=marker(x), markersize=4)
    if max(curve["runs"], default=1) > 1:
        band = curve["least"], curve["greatest"]
        panel.fill_between(x, *band, color=color, alpha=0.18, linewidth=0)


def _span(curves: Sequence[tuple[Values, Values]]) -> tuple[float | None, float | None]:
    """Choose the ends of the metric's axis; None: matplotlib chooses an end.

    Args:
        curves: The smallest and largest values of each group's runs, [rounds].
    """
    whole = np.concatenate([values for curve in curves for values in curve])
    later = np.concatenate([v[int(0.2 * len(v)) :] for curve in curves for v in curve])
    if not later.size:
        return None, None
    low, high = float(later.min()), float(later.max())
    if low == high or np.ptp(whole) <= 2 * (high - low):
        return None, None
    margin = 0.05 * (high - low)
    below, above = whole.min() < low, whole.max() > high
    return (low - margin if below else None), (high + margin if above else None)


@dataclass(frozen=True)
class MeasuredCurve:
    """Hold one curve.

    Attributes:
        x: Positions.
        y: Measured values.
        spread: Half the height of the band around them, or None.
        bound: Bound on the values, dashed in the color of the curve, or None.
    """

    x: Values
    y: Values
    spread: Values | None = None
    bound: Values | None = None


@dataclass(frozen=True)
class Panel:
    """Hold one panel of a figure.

    Attributes:
        title: Of the panel.
        labels: Of the axes.
        curves: By label.
        log: Logarithmic axes, for example ``"y"`` or ``"xy"``.
        floor: Smallest value on a logarithmic y axis, so that rounding errors do not stretch it.
        marks: Whether points are marked.
    """

    title: str
    labels: tuple[str, str]
    curves: Mapping[str, MeasuredCurve]
    log: str = "y"
    floor: float = 1e-7
    marks: bool = False


def bounds_figure(title: str, panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Draw panels of curves and bounds.

    Args:
        title: Of the figure.
        panels: In reading order; without any, nothing is drawn.
        columns: Number of panels in a row.
        path: The PNG to write.
    """
    if not panels:
        return
    rows = -(-len(panels) // columns)
    figure = new_figure(5.0 * columns, 4.5 * rows + 0.9)
    figure.suptitle(title, fontsize=13)
    for place, panel in zip(new_panels(figure, rows, columns, len(panels)), panels, strict=True):
        _draw(place, panel)
    bounded = any(c.bound is not None for panel in panels for c in panel.curves.values())
    if bounded:
        keys = [
            Line2D([], [], color="#444444", label="measured"),
            Line2D([], [], color="#444444", linestyle="--", linewidth=1.2, label="bound"),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=2, frameon=False)
    write_png(figure, path)


def _draw(place: Axes, panel: Panel) -> None:
    for index, (label, curve) in enumerate(panel.curves.items()):
        colour, mark = COLOURS[index % len(COLOURS)], "o" if panel.marks else ""
        style = "-" if index < len(COLOURS) else "-."
        seen = (curve.y > panel.floor) | ("y" not in panel.log)
        y = np.where(seen, curve.y, np.nan)
        place.plot(curve.x, y, style, color=colour, label=label, marker=mark, markersize=4)
        if curve.spread is not None:
            low = np.maximum(curve.y - curve.spread, panel.floor)
            high = curve.y + curve.spread
            place.fill_between(curve.x, low, high, where=seen, color=colour, alpha=0.2, linewidth=0)
        if curve.bound is not None:
            bound = np.where(curve.bound > panel.floor, curve.bound, np.nan)
            place.plot(curve.x, bound, "--", color=colour, linewidth=1.2)
    label_axes(place, *panel.labels)
    for axis in panel.log:
        make_logarithmic(place, axis)
    rows = 0
    if len(panel.curves) > 1:  # above, so that it covers no curve
        columns = 3 if max(map(len, panel.curves)) < 16 else 2
        rows = -(-len(panel.curves) // columns)
        place.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=columns,
            frameon=False,
            fontsize=8,
            columnspacing=1.2,
        )
    place.set_title(panel.title, fontsize=11, pad=6 + 14 * rows)


@dataclass(frozen=True)
class BoardRow:
    """Hold the figures of one method of a leaderboard.

    Attributes:
        label: Its name.
        mean, spread: The metric over the seeds; a spread of NaN is not drawn.
        uplink: MB that all clients sent.
        exact: Whether its aggregation is exact.
        method: The method whose color it has.
    """

    label: str
    mean: float
    spread: float
    uplink: float
    exact: bool
    method: str


def leaderboard_figure(entrants: Sequence[BoardRow], metric: str, path: Path) -> None:
    """Draw the metric of each method, and the metric against its uplink, by rank.

    A method with a failed seed does not stretch the axes: values outside are drawn at the lower
    end, with their numbers.

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
    styles = line_styles([entrant.method for entrant in entrants])
    for place, (entrant, style) in enumerate(zip(entrants, styles, strict=True)):
        spread = entrant.spread if math.isfinite(entrant.spread) else 0.0
        look = {"color": style.color, "fmt": SHAPES[entrant.exact]}
        if entrant.mean < low:
            text = {"va": "center", "fontsize": 9, "color": look["color"]}
            upper.annotate(f" ← {entrant.mean:.3g} ± {spread:.2g}", (low, place), **text)
            lower.plot(entrant.uplink, low, marker=CARETDOWN, color=look["color"], clip_on=False)
            continue
        upper.errorbar(entrant.mean, place, xerr=spread, capsize=3, **look)
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
    upper.set_ylim(len(entrants) - 0.4, -0.6)  # the best above
    label_axes(upper, metric, "")
    kinds = [
        Line2D([], [], color="#444444", linestyle="", marker=SHAPES[exact], label=text)
        for exact, text in ((True, "exact aggregation"), (False, "not exact"))
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=2, frameon=False)
    label_axes(lower, "uplink of all clients (MB)", metric)
    make_logarithmic(lower, "x")
    write_png(figure, path)


def spanned(entrants: Sequence[BoardRow]) -> tuple[float, float]:
    """Choose the range of the metric to draw, with a margin.

    It covers all means and spreads, except those whose spread is more than `WILD` times the
    usual one of the board.
    """
    spreads = [e.spread for e in entrants if math.isfinite(e.spread) and e.spread > 0]
    most = WILD * median(spreads) if spreads else math.inf
    found = [(e.mean, e.spread if e.spread > 0 else 0.0) for e in entrants if not e.spread > most]
    low, high = min(m - d for m, d in found), max(m + d for m, d in found)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def clusters(entrants: Sequence[BoardRow], near: float) -> list[tuple[BoardRow, str]]:
    """Choose the points with their own label, and the ranks near each of them.

    Args:
        entrants: The best first.
        near: Points of similar uplink whose means differ by at most this share a label, such as
            "5, 6, 8-13", since separate labels would overlap.
    """
    found: list[tuple[BoardRow, list[int]]] = []
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
