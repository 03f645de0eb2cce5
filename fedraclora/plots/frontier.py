"""Draw quality against bytes: the rows of a task by method family, and all tasks side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FuncFormatter

from fedraclora.plots.axes import label_axes, make_logarithmic, new_figure, write_png
from fedraclora.plots.palette import line_styles

MARKS = ("o", "s", "^", "D", "v", "P")
GOOD = 0.1  # the share that is marked
REACH, SHARE = 2.0, 0.4  # see `useful_range`

ROOM = 1.15  # beside the first and the last point, as a factor

Points = Sequence[tuple[float, float]]


def frontier_figure(
    groups: Mapping[str, tuple[Sequence[Points], Points]],
    labels: tuple[str, str],
    path: Path,
    *,
    marks: Sequence[float] = (),
    level: float | None = None,
    higher: bool = True,
) -> None:
    """Draw a metric against bytes: every row as a thin line, and the Pareto frontier of each group.

    A dot marks the end of a row; a row measured only at its end is a single dot. The axis of the
    metric covers the useful rows; a triangle at its edge marks a row outside.

    Args:
        groups: By method, or a similar name: of each row MB and metric after each measured
            round, and the points among these that are on the group's frontier.
        labels: Of the axes.
        path: The PNG to write.
        marks: MB to mark, if they lie among the points.
        level: Value of the metric to mark.
        higher: Whether more of the metric is better.
    """
    figure = new_figure(7.5, 4.5)
    panel = figure.subplots()
    best_of = max if higher else min
    finals = [best_of(y for _, y in row) for rows, _ in groups.values() for row in rows]
    edge, other = useful_range(finals, [] if level is None else [level], higher=higher)
    outside: list[float] = []
    for (name, (rows, best)), (color, _) in zip(
        groups.items(), line_styles([*groups]), strict=True
    ):
        if not rows:
            continue
        for row in rows:
            panel.plot(
                *zip(*row, strict=True),
                color=color,
                linewidth=0.7,
                alpha=0.35,
                marker=".",
                markevery=[-1],
            )
            if (final := best_of(y for _, y in row)) < edge if higher else final > edge:
                panel.plot(row[-1][0], edge, "v" if higher else "^", color=color, clip_on=False)
                outside.append(row[-1][0])
        ends = max(point[0] for row in rows for point in row)
        panel.plot(
            *zip(*best, (ends, best[-1][1]), strict=True),
            color=color,
            linewidth=2,
            drawstyle="steps-post",
            label=name,
        )
    label_axes(panel, *labels, legend=True)
    make_logarithmic(panel, "x")
    panel.set_ylim(min(edge, other), max(edge, other))
    if level is not None:
        panel.axhline(level, color="#555555", linestyle="--", linewidth=1)
    seen = [x for x, y in _points(groups) if (y >= edge if higher else y <= edge)] + outside
    least, most = min(seen) / ROOM, max(x for x, _ in _points(groups)) * ROOM
    panel.set_xlim(least, most)
    for mark in marks:
        if least < mark < most:
            panel.axvline(mark, color="#555555", linestyle=":", linewidth=1)
    write_png(figure, path)


def _points(groups: Mapping[str, tuple[Sequence[Points], Points]]) -> list[tuple[float, float]]:
    return [point for rows, _ in groups.values() for row in rows for point in row]


def useful_range(
    finals: Sequence[float], kept: Sequence[float] = (), *, higher: bool = True
) -> tuple[float, float]:
    """Choose the range of a metric in which rows worth using differ.

    Below the best it extends `REACH` times as far as the best `SHARE` of the rows does, and at
    most to the worst.

    Args:
        finals: The final value of each row.
        kept: Further values that it must contain.
        higher: Whether more of the metric is better.

    Returns:
        The end of the worse values, and that of the better ones.
    """
    sign = 1 if higher else -1
    good, held = ([sign * value for value in values] for values in (finals, kept))
    best, last = max(good), sorted(good, reverse=True)[int(SHARE * len(good))]
    least = min([max(min(good), best - REACH * (best - last)), *held])
    best = max([best, *held])
    margin = 0.08 * (best - least) or 0.05
    return sign * (least - margin), sign * (best + margin)


def shares_figure(
    found: Mapping[str, Mapping[str, float]], tasks: Sequence[str], reference: str, path: Path
) -> None:
    """Draw the share of the reference's traffic that each family needs to reach it, by task.

    Args:
        found: By family and task, the share.
        tasks: Their names, from the top.
        reference: Its label.
        path: The PNG to write.
    """
    figure = new_figure(7.5, 1.2 + 0.5 * len(tasks))
    panel = figure.subplots()
    colors = [look.color for look in line_styles([*found])]
    for index, (family, shares) in enumerate(found.items()):
        color = colors[index]
        panel.plot(
            [*shares.values()],
            [-tasks.index(task) for task in shares],
            color=color,
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
