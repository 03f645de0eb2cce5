"""Aggregate robustly: limit the influence of attackers among the clients of a round.

The rules take one vector per client and return one vector. They work on float64 rows [K, P], a
client's trained tensors packed into one vector, and count every client once: an attacker may claim
any number of samples. None depends on the order of the clients, except for rounding and exact ties
of Krum.

Distances are Euclidean, over all that a client sends. With one shared sketch A of orthonormal rows
(the default) ``||s (B_i - B_j) A||_F = s ||B_i - B_j||_F``: distances of factors are those of the
effective weights, up to the constant s of all adapters. Under another shared A they lie between its
least and greatest singular value times that. If both factors are trained, or each client has its
own A, a distance of factors bounds no distance of effective weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, Aggregator, Mean, Total, rows_of, starts
from fedraclora.errors import ConfigError
from fedraclora.limits import Count, Limit, Positive
from fedraclora.protocol.uplinks import Uplinks


def share_of(count: int, share: float) -> int:
    """Convert a share below 1 to a number of clients, rounded up; keep a number from 1 on.

    Example:
        >>> share_of(20, 0.2), share_of(9, 0.2), share_of(9, 3)
        (4, 2, 3)
    """
    return math.ceil(share * count - 1e-9) if share < 1 else int(share)


def trimmed_mean(rows: torch.Tensor, cut: int) -> torch.Tensor:
    """Average each coordinate without its ``cut`` least and ``cut`` greatest values.

    Withstands ``cut`` attackers: the result lies between two honest values in each coordinate.

    Args:
        rows: float64 [K, P].
        cut: 0 or more, below K / 2.

    Returns:
        float64 [P].

    Raises:
        ConfigError: If nothing would be left.

    References:
        Yin et al., *Byzantine-robust distributed learning*, arXiv 1803.01498.
    """
    K = len(rows)
    if 2 * cut >= K:
        raise ConfigError(
            f"a trimmed mean leaves out {cut} clients at each end, so that it needs more than "
            f"{2 * cut}, but only {K} answered: raise clients_per_round "
            "or lower aggregator.attackers"
        )
    return rows.sort(dim=0).values[cut : K - cut].mean(dim=0)


def median(rows: torch.Tensor) -> torch.Tensor:
    """Compute the median of each coordinate; of an even number, the mean of the middle two.

    Withstands fewer than half of the clients. Arguments and source as for `trimmed_mean`.
    """
    return trimmed_mean(rows, (len(rows) - 1) // 2)


def krum_order(rows: torch.Tensor, attackers: int) -> torch.Tensor:
    """Order clients by their Krum score, the lowest first.

    The score is the sum of squared distances to the K - f - 2 nearest other clients: a vector among
    many similar ones has a low score.

    Args:
        rows: float64 [K, P].
        attackers: f, with K >= 2 f + 3.

    Returns:
        Places, int64 [K].

    Raises:
        ConfigError: If there are too few clients.

    References:
        Blanchard et al., *Byzantine-tolerant machine learning*, arXiv 1703.02757.
    """
    K = len(rows)
    if 2 * attackers + 3 > K:
        raise ConfigError(
            f"Krum withstands {attackers} attackers among {2 * attackers + 3} clients or more, "
            f"but {K} answered; raise clients_per_round or lower aggregator.attackers"
        )
    # Differences, not a Gram matrix: a distant attacker must not affect the rounding of other
    # distances.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = apart.sort(dim=1).values[:, 1 : K - attackers - 1]
    return torch.argsort(nearest.sum(dim=1), stable=True)


def shortened(rows: torch.Tensor, start: torch.Tensor, bound: float) -> torch.Tensor:
    """Scale updates ``rows - start`` that are longer than ``bound`` down to it.

    Args:
        rows: float64 [K, P].
        start: float64 [P] or [K, P].
        bound: The greatest Euclidean norm.

    Returns:
        float64 [K, P]; a row whose update is short enough keeps its bits.
    """
    updates = rows - start
    norms = torch.linalg.vector_norm(updates, dim=1, keepdim=True)
    return torch.where(norms > bound, start + updates * (bound / norms), rows)


# Attackers that a rule withstands: a share of the replies, or a number of clients.
_Attackers = Annotated[
    float,
    Limit(
        "a share in [0, 0.5) or a number of clients",
        lambda value: 0 <= value < 0.5 or (value >= 1 and value == int(value)),
    ),
]


@dataclass(frozen=True)
class Estimate(Aggregator):
    """Base of the rules that replace the mean by another vector."""

    estimates: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    @abstractmethod
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        """Estimate the vector, float64 [P], from rows float64 [K, P]."""

    @override
    def check(self, cohort: int) -> None:
        self.estimate(torch.zeros(cohort, 1, dtype=torch.float64))

    @override
    def __call__(self, uplinks: Uplinks, setting: AggregationContext) -> Uplinks:
        return replace(
            uplinks, stacked=None, summed=self.estimate(rows_of(uplinks)) * uplinks.total
        )


@dataclass(frozen=True)
class Median(Estimate):
    """Coordinate-wise median; every client has the same weight."""

    name: ClassVar[str] = "median"

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return median(rows)


@dataclass(frozen=True)
class TrimmedMean(Estimate):
    """Coordinate-wise trimmed mean; every client has the same weight.

    Attributes:
        attackers: Clients cut at each end; a share of the replies if below 1.
    """

    name: ClassVar[str] = "trimmed_mean"

    attackers: _Attackers = 0.2

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        return trimmed_mean(rows, share_of(len(rows), self.attackers))


@dataclass(frozen=True)
class GeometricMedian(Estimate):
    """Geometric median (RFA, Weiszfeld); every client has the same weight.

    The point of least total distance to the rows, by the smoothed Weiszfeld algorithm. It
    withstands fewer than half of the clients.

    Attributes:
        smoothing: Lower bound of distances.
        tolerance: Stop once the total distance falls by less than this share.
        iterations: Most iterations.

    References:
        Pillutla et al., *Robust aggregation for federated learning*, arXiv 1912.13445 (RFA).
        Departures: equal weights; starts at the coordinate-wise median, which attackers cannot move
        far, not at the mean.
    """

    name: ClassVar[str] = "geometric_median"

    smoothing: Positive = 1e-6
    tolerance: Positive = 1e-10
    iterations: Count = 200

    @override
    def estimate(self, rows: torch.Tensor) -> torch.Tensor:
        point = median(rows)
        distances = torch.linalg.vector_norm(rows - point, dim=1)
        for _ in range(self.iterations):
            # No division by zero at a client's own vector.
            pull = 1 / distances.clamp(min=self.smoothing)
            point = (pull[:, None] * rows).sum(dim=0) / pull.sum()
            before = float(distances.sum())
            distances = torch.linalg.vector_norm(rows - point, dim=1)
            if before - float(distances.sum()) <= self.tolerance * before:
                break
        return point


@dataclass(frozen=True)
class MultiKrum(Aggregator):
    """Multi-Krum: the mean of the updates that are closest to their neighbours.

    Attributes:
        attackers: f, the attackers to withstand; a share of the replies if below 1.
        kept: Clients that are averaged; None: all but f.
    """

    name: ClassVar[str] = "multi_krum"
    compares: ClassVar[bool] = True

    attackers: _Attackers = 0.2
    kept: Count | None = None

    def choose(self, rows: torch.Tensor) -> torch.Tensor:
        """Choose the clients to keep, as places in ascending order, from rows float64 [K, P]."""
        f = share_of(len(rows), self.attackers)
        return krum_order(rows, f)[: self.kept or len(rows) - f].sort().values

    @override
    def check(self, cohort: int) -> None:
        self.choose(torch.zeros(cohort, 1, dtype=torch.float64))

    @override
    def __call__(self, uplinks: Uplinks, setting: AggregationContext) -> Uplinks:
        kept = self.choose(rows_of(uplinks))
        # A weight of 0 excludes a client but keeps its position, which a stacked method may need.
        weights = torch.zeros_like(uplinks.weights)
        weights[kept] = 1.0
        return replace(uplinks, weights=weights)


@dataclass(frozen=True)
class Krum(MultiKrum):
    """Krum: the one update that is closest to its neighbours."""

    name: ClassVar[str] = "krum"

    kept: Count | None = 1


@dataclass(frozen=True)
class NormBound(Aggregator):
    """Average after clipping the norm of updates.

    Attributes:
        bound: Largest norm of an update; longer ones are scaled down.

    References:
        Sun et al., *Can you really backdoor federated learning?*, arXiv 1911.07963.
    """

    name: ClassVar[str] = "norm_bound"

    bound: Positive = 1.0

    @override
    def __call__(self, uplinks: Uplinks, setting: AggregationContext) -> Uplinks:
        return replace(
            uplinks, stacked=shortened(rows_of(uplinks), starts(setting, uplinks), self.bound)
        )


AGGREGATORS: dict[str, type[Aggregator]] = {
    kind.name: kind
    for kind in (Mean, Total, Median, TrimmedMean, GeometricMedian, Krum, MultiKrum, NormBound)
}
