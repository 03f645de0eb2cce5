"""Figures of quality against bytes: the rows of a task by family, and all tasks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from fedraclora.plots.axes import COLOURS, label_axes, make_logarithmic, new_figure, write_png

MARKS = ("o", "s", "^", "D", "v", "P")
GOOD, LESS = 0.1, 0.5  # shares that are marked; part of the metric's range that is drawn

Points = Sequence[tuple[float, float]]


def task_figure(
    groups: Mapping[str, tuple[Sequence[Points], Points]],
    reference: tuple[float, float],
    metric: str,
    path: Path,
) -> None:
    """Draw every row of a task, thin, and over those of a family what none of them beats.

    Args:
        groups: By family, of each row the MB both ways and the metric after each measured round,
            and those of these points that none of the family beats; its place is its colour.
        reference: All MB of the row that the others are held against, and its metric at the end.
        metric: Its name.
        path: The PNG to write.
    """
    figure = new_figure(7.5, 4.5)
    panel = figure.subplots()
    for index, (family, (rows, best)) in enumerate(groups.items()):
        if not rows:
            continue
        colour = COLOURS[index % len(COLOURS)]
        for row in rows:
            panel.plot(*zip(*row, strict=True), color=colour, linewidth=0.7, alpha=0.35)
        ends = max(point[0] for row in rows for point in row)
        panel.plot(
            *zip(*best, (ends, best[-1][1]), strict=True),
            color=colour,
            linewidth=2,
            drawstyle="steps-post",
            label=family,
        )
    whole, target = reference
    label_axes(panel, "MB both ways, with catch-up, of all clients", metric, legend=True)
    make_logarithmic(panel, "x")
    finals = [target, *(max(y for _, y in row) for rows, _ in groups.values() for row in rows)]
    low, high = min(finals), max(finals)
    panel.set_ylim(low - LESS * (high - low), high + 0.1 * (high - low))
    panel.axhline(target, color="#555555", linestyle="--", linewidth=1)
    panel.axvline(GOOD * whole, color="#555555", linestyle=":", linewidth=1)
    write_png(figure, path)


def shares_figure(
    found: Mapping[str, Mapping[str, float]], tasks: Sequence[str], path: Path
) -> None:
    """Draw how much of the reference's traffic each family needs, by task, if it gets there.

    Args:
        found: By family and task, the share; the place of a family is its colour.
        tasks: Their names, from above.
        path: The PNG to write.
    """
    figure = new_figure(7.5, 1.2 + 0.5 * len(tasks))
    panel = figure.subplots()
    for index, (family, shares) in enumerate(found.items()):
        panel.plot(
            [*shares.values()],
            [-tasks.index(task) for task in shares],
            color=COLOURS[index % len(COLOURS)],
            linestyle="",
            marker=MARKS[index % len(MARKS)],
            markersize=9 if not index else 7,
            label=family if shares else None,
        )
    panel.set_yticks([-place for place in range(len(tasks))], [*tasks])
    panel.set_ylim(0.5 - len(tasks), 0.5)
    label_axes(
        panel, "share of FedAvg-LoRA's traffic (float32) until its final metric", "", legend=True
    )
    make_logarithmic(panel, "x")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    panel.axvline(GOOD, color="#555555", linestyle=":", linewidth=1)
    panel.axvline(1, color="#555555", linestyle="--", linewidth=1)
    write_png(figure, path)
