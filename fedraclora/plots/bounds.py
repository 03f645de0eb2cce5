"""Figure of measured curves beside the bounds on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedraclora.plots.axes import (
    COLOURS,
    Vector,
    label_axes,
    make_logarithmic,
    new_figure,
    new_panels,
    write_png,
)


@dataclass(frozen=True)
class Measured:
    """One curve.

    Attributes:
        x: Positions.
        y: Measured values.
        spread: Half the height of the band around them, or None.
        bound: Bound on the values, dashed in the colour of the curve, or None.
    """

    x: Vector
    y: Vector
    spread: Vector | None = None
    bound: Vector | None = None


@dataclass(frozen=True)
class Panel:
    """One panel: its title, its axes, its curves by label, and what it says below the title.

    Attributes:
        title: Of the panel.
        labels: Of the axes.
        curves: By label.
        log: Axes that are logarithmic, for example ``"y"`` or ``"xy"``.
        floor: Least value on a logarithmic y axis, so that rounding errors do not stretch it.
        marks: Whether points are marked.
    """

    title: str
    labels: tuple[str, str]
    curves: Mapping[str, Measured]
    log: str = "y"
    floor: float = 1e-7
    marks: bool = False


def bounds_figure(title: str, panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Draw panels of curves and bounds.

    Args:
        title: Of the figure.
        panels: In reading order; without one, nothing is drawn.
        columns: Panels beside one another.
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
