"""The settings that no other beats in metric and bytes at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

STEADY = 5  # measured rounds that are averaged, at most


@dataclass(frozen=True)
class Point:
    """What a run had after a round.

    Attributes:
        round: Of the run.
        bytes: Of all clients both ways, so far.
        score: The metric.
        trial: Number of the run.
    """

    round: int
    bytes: float
    score: float
    trial: int = -1


def frontier(points: Iterable[Point], *, higher: bool) -> list[Point]:
    """List the points that none beats: no other has as good a metric at as few bytes.

    Args:
        points: Of points that are equal in both, the first is kept.
        higher: Whether more of the metric is better.

    Returns:
        By bytes; the metric gets better from one to the next.

    Example:
        >>> points = [Point(1, 10, 0.5), Point(2, 20, 0.4), Point(3, 30, 0.9)]
        >>> [point.bytes for point in frontier(points, higher=True)]
        [10, 30]
    """
    sign = 1 if higher else -1
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, -sign * p.score)):
        if not found or sign * point.score > sign * found[-1].score:
            found.append(point)
    return found


def ranks(values: Sequence[Sequence[float]]) -> list[int]:
    """Give each its Pareto rank: 0 where no other has as much of all and more of some, and so on.

    Example:
        >>> ranks([(3, 1), (2, 2), (2, 1), (1, 1)])
        [0, 0, 1, 2]
    """
    found, left = dict[int, int](), [*range(len(values))]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a >= b for a, b in zip(one, other, strict=True)) and [*one] != [*other]

    while left:
        first = [k for k in left if not any(beats(values[j], values[k]) for j in left)]
        found |= dict.fromkeys(first, max(found.values(), default=-1) + 1)
        left = [k for k in left if k not in found]
    return [found[k] for k in range(len(values))]


def last_within(curve: Sequence[Point], most: float) -> Point:
    """Return the last point of at most so many bytes, with the mean score of the last quarter.

    One round is lucky or unlucky: the last quarter of the trained points there counts, at most
    `STEADY` of them. Where all have more bytes it is the first point, of the untrained model.
    """
    there = [point for point in curve if point.bytes <= most and point.round]
    if not there:
        return curve[0]
    last = there[-min(STEADY, math.ceil(len(there) / 4)) :]
    return replace(last[-1], score=fmean(point.score for point in last))


def mean_curve(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Average the curves of several seeds at the rounds that all of them measured."""
    common = set.intersection(*({point.round for point in curve} for curve in curves))
    alike = zip(*([p for p in curve if p.round in common] for curve in curves), strict=True)
    return [
        Point(at[0].round, fmean(p.bytes for p in at), fmean(p.score for p in at)) for at in alike
    ]
