"""Robust rules as aggregators: what a cohort with attackers in it hands on to the method."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

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
from fedraclora.errors import ConfigError
from fedraclora.protocol.uplinks import Uplinks


@dataclass(frozen=True)
class Estimate(Aggregator):
    """Base of the rules that put one vector in the place of the mean."""

    estimates: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    @abstractmethod
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        """Give the vector, float64 [P], for rows float64 [K, P]."""

    @override
    def check(self, cohort: int) -> None:
        self.estimate(torch.zeros(cohort, 1, dtype=torch.float64))

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        del setting
        return replace(got, stacked=None, summed=self.estimate(rows_of(got)) * got.total)


@dataclass(frozen=True)
class Median(Estimate):
    """Coordinate-wise median."""

    name: ClassVar[str] = "median"

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return median(rows)


@dataclass(frozen=True)
class TrimmedMean(Estimate):
    """Coordinate-wise trimmed mean.

    Attributes:
        attackers: Clients that are cut at each end; a share of those that answered if below 1.
    """

    name: ClassVar[str] = "trimmed_mean"

    attackers: float = 0.2

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        check_attackers(self.attackers)

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return trimmed_mean(rows, share_of(len(rows), self.attackers))


@dataclass(frozen=True)
class GeometricMedian(Estimate):
    """Geometric median; see `statistics.geometric_median` for the attributes."""

    name: ClassVar[str] = "geometric_median"

    smoothing: float = 1e-6
    tolerance: float = 1e-10
    iterations: int = 200

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        for key in ("smoothing", "tolerance", "iterations"):
            if not 0 < getattr(self, key) < math.inf:
                raise ConfigError(f"aggregator.{key} is {getattr(self, key)}; above 0 is wanted")

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return geometric_median(
            rows,
            smoothing=self.smoothing,
            tolerance=self.tolerance,
            iterations=self.iterations,
        )


@dataclass(frozen=True)
class MultiKrum(Aggregator):
    """Average the clients with the least scores of Krum, each counted once.

    Attributes:
        attackers: f, how many it must withstand; a share of those that answered if below 1.
        kept: Clients that are averaged; None: all but f.
    """

    name: ClassVar[str] = "multi_krum"
    compares: ClassVar[bool] = True

    attackers: float = 0.2
    kept: int | None = None

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        check_attackers(self.attackers)
        if self.kept is not None and self.kept < 1:
            raise ConfigError(f"aggregator.kept is {self.kept}; 1 or more, or null, is wanted")

    def choose(self, rows: torch.Tensor) -> torch.Tensor:
        """Give the places that are kept, ascending, for rows float64 [K, P]."""
        f = share_of(len(rows), self.attackers)
        order = krum_order(rows, f)
        return order[: self.kept or len(rows) - f].sort().values

    @override
    def check(self, cohort: int) -> None:
        self.choose(torch.zeros(cohort, 1, dtype=torch.float64))

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        del setting
        kept = self.choose(rows_of(got))
        # The weight of 0 leaves a client out and its place to it, which a stacked method may need.
        weights = torch.zeros_like(got.weights)
        weights[kept] = 1.0
        return replace(got, weights=weights)


@dataclass(frozen=True)
class Krum(MultiKrum):
    """Take the one client with the least score of Krum; ``kept`` is 1."""

    name: ClassVar[str] = "krum"

    kept: int | None = 1


@dataclass(frozen=True)
class NormBound(Aggregator):
    """Shorten each client's update to a bound, over all that it sends; weights stay.

    Attributes:
        bound: The greatest norm of an update that is left as it is.

    References:
        Sun et al., *Can you really backdoor federated learning?*, arXiv 1911.07963.
    """

    name: ClassVar[str] = "norm_bound"

    bound: float = 1.0

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if not 0 < self.bound < math.inf:
            raise ConfigError(f"aggregator.bound is {self.bound}; a positive number is wanted")

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        return replace(got, stacked=shortened(rows_of(got), starts(setting, got), self.bound))


def check_attackers(attackers: float) -> None:
    """Refuse a number of attackers that no rule withstands.

    Raises:
        ConfigError: Unless it is a share in [0, 0.5), or a whole number.
    """
    if not (0 <= attackers < 0.5 or (attackers >= 1 and attackers == int(attackers))):
        raise ConfigError(
            f"aggregator.attackers is {attackers}; a share in [0, 0.5) or a number of clients is "
            "wanted"
        )


AGGREGATORS: dict[str, type[Aggregator]] = {
    kind.name: kind
    for kind in (Mean, Total, Median, TrimmedMean, GeometricMedian, Krum, MultiKrum, NormBound)
}
