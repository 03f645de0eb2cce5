"""Robust rules as aggregators: what a cohort with attackers in it hands on to the method."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, Aggregator, Mean, Total, rows_of, starts
from fedraclora.aggregation.statistics import (
    geometric_median,
    krum_order,
    median,
    share_of,
    shortened,
    trimmed_mean,
)
from fedraclora.limits import Count, Limit, Positive
from fedraclora.protocol.uplinks import Uplinks

# How many attackers a rule withstands: a share of those that answered, or a number of clients.
Attackers = Annotated[
    float,
    Limit(
        "a share in [0, 0.5) or a number of clients",
        lambda value: 0 <= value < 0.5 or (value >= 1 and value == int(value)),
    ),
]


@dataclass(frozen=True)
class Estimate(Aggregator):
    """Base of the rules that put one vector in the place of the mean."""

    estimates: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    @abstractmethod
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        """Estimate the vector, float64 [P], from rows float64 [K, P]."""

    @override
    def check(self, cohort: int) -> None:
        self.estimate(torch.zeros(cohort, 1, dtype=torch.float64))

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        return replace(got, stacked=None, summed=self.estimate(rows_of(got)) * got.total)


@dataclass(frozen=True)
class Median(Estimate):
    """Coordinate-wise median; clients count alike."""

    name: ClassVar[str] = "median"

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return median(rows)


@dataclass(frozen=True)
class TrimmedMean(Estimate):
    """Coordinate-wise trimmed mean; clients count alike.

    Attributes:
        attackers: Clients that are cut at each end; a share of those that answered if below 1.
    """

    name: ClassVar[str] = "trimmed_mean"

    attackers: Attackers = 0.2

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return trimmed_mean(rows, share_of(len(rows), self.attackers))


@dataclass(frozen=True)
class GeometricMedian(Estimate):
    """Geometric median (RFA, Weiszfeld); clients count alike.

    Attributes:
        smoothing: Distances below it count as it.
        tolerance: Stop once the total distance falls by less than this share of itself.
        iterations: The most there may be.
    """

    name: ClassVar[str] = "geometric_median"

    smoothing: Positive = 1e-6
    tolerance: Positive = 1e-10
    iterations: Count = 200

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return geometric_median(rows, **vars(self))


@dataclass(frozen=True)
class MultiKrum(Aggregator):
    """Multi-Krum: the mean of the updates that are nearest to their neighbours.

    Attributes:
        attackers: f, how many it must withstand; a share of those that answered if below 1.
        kept: Clients that are averaged; None: all but f.
    """

    name: ClassVar[str] = "multi_krum"
    compares: ClassVar[bool] = True

    attackers: Attackers = 0.2
    kept: Count | None = None

    def choose(self, rows: torch.Tensor) -> torch.Tensor:
        """Choose the clients to keep, as places in ascending order, from rows float64 [K, P]."""
        f = share_of(len(rows), self.attackers)
        order = krum_order(rows, f)
        return order[: self.kept or len(rows) - f].sort().values

    @override
    def check(self, cohort: int) -> None:
        self.choose(torch.zeros(cohort, 1, dtype=torch.float64))

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        kept = self.choose(rows_of(got))
        # The weight of 0 leaves a client out and its place to it, which a stacked method may need.
        weights = torch.zeros_like(got.weights)
        weights[kept] = 1.0
        return replace(got, weights=weights)


@dataclass(frozen=True)
class Krum(MultiKrum):
    """Krum: the one update that is nearest to its neighbours."""

    name: ClassVar[str] = "krum"

    kept: Count | None = 1


@dataclass(frozen=True)
class NormBound(Aggregator):
    """Averaging, with updates shortened to a greatest norm.

    Attributes:
        bound: The greatest norm of an update that is left as it is.

    References:
        Sun et al., *Can you really backdoor federated learning?*, arXiv 1911.07963.
    """

    name: ClassVar[str] = "norm_bound"

    bound: Positive = 1.0

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        return replace(got, stacked=shortened(rows_of(got), starts(setting, got), self.bound))


AGGREGATORS: dict[str, type[Aggregator]] = {
    kind.name: kind
    for kind in (Mean, Total, Median, TrimmedMean, GeometricMedian, Krum, MultiKrum, NormBound)
}
