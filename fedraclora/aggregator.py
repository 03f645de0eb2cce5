"""Aggregators: what happens to checked uplinks before the method sees them.

An aggregator may keep clients apart (robust rules), reduce them to their sum (as secure
aggregation does), or change them (clipping, noise). It knows what was sent, so that it can tell
an update from its start, and has the seed tree for its own draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedraclora.aggregate import Uplinks
from fedraclora.method import Downlink, Draw


@dataclass(frozen=True)
class Setting:
    """What an aggregator may know beside the uplinks."""

    sent: Downlink
    round_: int
    draw: Draw


Aggregator = Callable[[Uplinks, Setting], Uplinks]


def mean(got: Uplinks, setting: Setting) -> Uplinks:
    """Plain weighted averaging: nothing to do before the method takes the mean."""
    del setting
    return got


def total(got: Uplinks, setting: Setting) -> Uplinks:
    """Hand over the weighted sum only, as secure aggregation would."""
    del setting
    if got.stacked is None:
        return got
    return replace(got, stacked=None, summed=got.sum())


AGGREGATORS: dict[str, Aggregator] = {"mean": mean, "sum": total}
SUMMING = (mean, total)  # those for which the sum of a cohort is enough
