"""Figure of a comparison: a metric against what it costs, one line per group of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np

from fedraclora.ledger import Row, column, round_seconds
from fedraclora.plots.axes import (
    COLOURS,
    DASHES,
    MEGABYTE,
    Vector,
    label_axes,
    make_logarithmic,
    marker,
    new_figure,
    write_png,
)

_POSITIONS = (
    "round",
    "uplink of all clients so far (MB)",
    "uplink + downlink with catch-up so far (MB)",
    "seconds so far",
    "virtual seconds so far",
)


def compare_figure(groups: Mapping[str, Sequence[Sequence[Row]]], metric: str, path: Path) -> None:
    """Draw a metric against rounds, uplink, all traffic and seconds, one line per group.

    Where a run has a virtual clock, the metric is drawn against its time, too.

    A line is the mean over the group's ledgers (seeds) at the rounds that all of them
    evaluated; the band runs from the least to the greatest of them.

    Args:
        groups: Label -> ledgers.
        metric: Key of the rows' ``metrics``.
        path: The PNG to write.
    """
    labels = [fill(label, 120) for label in groups]
    legend_columns = max(1, min(len(groups), 150 // (max(map(len, labels), default=0) + 8)))
    legend_rows = math.ceil(len("\n".join(labels).splitlines()) / legend_columns)
    timed = any(
        "virtual_seconds" in row for runs in groups.values() for rows in runs for row in rows
    )
    positions = _POSITIONS if timed else _POSITIONS[:-1]
    figure = new_figure(17 if timed else 12, 8.5 + 0.24 * legend_rows)
    figure.suptitle(f"{metric}: mean over seeds, band from least to greatest", fontsize=13)
    grid = figure.subplots(2, 3 if timed else 2, sharey=True)
    panels = grid.ravel()[: len(positions)]
    for unused in grid.ravel()[len(positions) :]:
        unused.remove()
    for index, ledgers in enumerate(groups.values()):
        seeds = _on_common_rounds(ledgers, metric)
        y, colour = seeds[:, :, -1], COLOURS[index % len(COLOURS)]
        dash = DASHES[index // len(COLOURS) % len(DASHES)]
        where = seeds[:, :, :-1].mean(axis=0)
        where[:, 1:3][where[:, 1:3] <= 0] = np.nan  # no place on the logarithmic axes
        for panel, x in zip(panels, where.T, strict=False):
            panel.plot(x, y.mean(axis=0), dash, color=colour, marker=marker(x), markersize=4)
            if len(seeds) > 1:
                panel.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.18, linewidth=0)
    for panel, name in zip(panels, positions, strict=True):
        label_axes(panel, name, metric if panel in grid[:, 0] else "")
        if "MB" in name:
            make_logarithmic(panel, "x")
    lines = panels[0].get_lines()
    figure.legend(lines, labels, loc="outside lower center", ncols=legend_columns, frameon=False)
    write_png(figure, path)


def _on_common_rounds(ledgers: Sequence[Sequence[Row]], metric: str) -> Vector:
    """The rounds that all ledgers evaluated: [ledgers, rounds, `_POSITIONS` and the metric]."""
    tables = []
    for rows in ledgers:
        up, down = (column(rows, f"{way}_total") / MEGABYTE for way in ("uplink", "downlink"))
        seconds = np.cumsum([round_seconds(row) for row in rows])
        must = (column(rows, "round"), up, up + down, seconds, column(rows, "metrics", metric))
        known = np.isfinite(must).all(axis=0)
        # Not every run has a virtual clock; the others have no line there.
        table = np.stack([*must[:-1], column(rows, "virtual_seconds"), must[-1]], axis=1)
        tables.append(table[known])
    common = set.intersection(*(set(table[:, 0]) for table in tables))
    return np.stack([table[np.isin(table[:, 0], list(common))] for table in tables])
