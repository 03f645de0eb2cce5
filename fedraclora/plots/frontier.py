"""Figures of quality against bytes: the rows of a task by family, and all tasks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from fedraclora.plots.axes import COLOURS, label_axes, make_logarithmic, new_figure, write_png

MARKS = ("o", "s", "^", "D", "v", "P")
GOOD, LESS = 0.1, 0.5  # the share that is marked; part of the metric's range that is drawn

Points = Sequence[tuple[float, float]]


def frontier_figure(
    groups: Mapping[str, tuple[Sequence[Points], Points]],
    labels: tuple[str, str],
    path: Path,
    *,
    marks: Sequence[float] = (),
    level: float | None = None,
) -> None:
    """Draw a metric against bytes: every row, thin, and over those of a group what none beats.

    A row's end is a dot: one that was measured at its end alone is that.

    Args:
        groups: By name, of each row the MB and the metric after each measured round, and those of
            these points that none of the group beats; its place is its colour.
        labels: Of the axes.
        path: The PNG to write.
        marks: MB that are marked, where they lie among the points.
        level: Of the metric: it is marked, and what lies far below it is not shown.
    """
    figure = new_figure(7.5, 4.5)
    panel = figure.subplots()
    for index, (family, (rows, best)) in enumerate(groups.items()):
        if not rows:
            continue
        colour = COLOURS[index % len(COLOURS)]
        for row in rows:
            panel.plot(
                *zip(*row, strict=True),
                color=colour,
                linewidth=0.7,
                alpha=0.35,
                marker=".",
                markevery=[-1],
            )
        ends = max(point[0] for row in rows for point in row)
        panel.plot(
            *zip(*best, (ends, best[-1][1]), strict=True),
            color=colour,
            linewidth=2,
            drawstyle="steps-post",
            label=family,
        )
    label_axes(panel, *labels, legend=True)
    make_logarithmic(panel, "x")
    if level is not None:
        finals = [level, *(max(y for _, y in row) for rows, _ in groups.values() for row in rows)]
        low, high = min(finals), max(finals)
        panel.set_ylim(low - LESS * (high - low), high + 0.1 * (high - low))
        panel.axhline(level, color="#555555", linestyle="--", linewidth=1)
    least, most = panel.get_xlim()
    for mark in marks:
        if least < mark < most:
            panel.axvline(mark, color="#555555", linestyle=":", linewidth=1)
    write_png(figure, path)


def shares_figure(
    found: Mapping[str, Mapping[str, float]], tasks: Sequence[str], reference: str, path: Path
) -> None:
    """Draw how much of the reference's traffic each family needs, by task, if it gets there.

    Args:
        found: By family and task, the share; the place of a family is its colour.
        tasks: Their names, from above.
        reference: What it is called.
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
    title = f"share of the traffic of {reference} until its final metric"
    label_axes(panel, title, "", legend=True)
    make_logarithmic(panel, "x")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    panel.axvline(GOOD, color="#555555", linestyle=":", linewidth=1)
    panel.axvline(1, color="#555555", linestyle="--", linewidth=1)
    write_png(figure, path)
