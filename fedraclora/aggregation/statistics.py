"""Robust statistics of a cohort's updates: one vector per client in, one vector out.

All of them work on float64 rows [K, P], a client's trained tensors packed into one vector, and
count every client once: the number of samples is what a client claims, and an attacker may claim
any. None depends on the order of the clients, but for rounding and for exact ties of Krum.

Distances are Euclidean, over all that a client sends. With one shared sketch A of orthonormal rows
(the default) ``||s (B_i - B_j) A||_F = s ||B_i - B_j||_F``: distances of factors are those of the
effective weights, up to the one constant s for all adapters. Under another shared A they lie
between its least and greatest singular value times that; where both factors are trained, or A is
the client's own, a distance of factors says nothing certain about one of effective weights.
"""

from __future__ import annotations

import math

import torch

from fedraclora.errors import ConfigError


def share_of(count: int, share: float) -> int:
    """Count how many of ``count`` clients a share below 1 is, rounded up; from 1 on it is a number.

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
            f"{2 * cut}, but only {K} answered: raise cohort or lower aggregator.attackers"
        )
    return rows.sort(dim=0).values[cut : K - cut].mean(dim=0)


def median(rows: torch.Tensor) -> torch.Tensor:
    """Take the median of each coordinate; of an even number, the mean of the middle two.

    Withstands fewer than half of the clients. Arguments and source as for `trimmed_mean`.
    """
    return trimmed_mean(rows, (len(rows) - 1) // 2)


def geometric_median(
    rows: torch.Tensor, *, smoothing: float, tolerance: float, iterations: int
) -> torch.Tensor:
    """Find the point of least total distance to the rows, by the smoothed Weiszfeld algorithm.

    Withstands fewer than half of the clients.

    Args:
        rows: float64 [K, P].
        smoothing: Distances below it count as it: no division by zero at a client's own point.
        tolerance: Stop once the total distance falls by less than this share of itself.
        iterations: The most there may be.

    Returns:
        float64 [P].

    References:
        Pillutla et al., *Robust aggregation for federated learning*, arXiv 1912.13445 (RFA).
        Departures: equal weights; begins at the coordinate-wise median, which no attacker moves
        far, and not at the mean.
    """
    point = median(rows)
    distances = torch.linalg.vector_norm(rows - point, dim=1)
    for _ in range(iterations):
        pull = 1 / distances.clamp(min=smoothing)
        point = (pull[:, None] * rows).sum(dim=0) / pull.sum()
        before = float(distances.sum())
        distances = torch.linalg.vector_norm(rows - point, dim=1)
        if before - float(distances.sum()) <= tolerance * before:
            break
    return point


def krum_order(rows: torch.Tensor, attackers: int) -> torch.Tensor:
    """Order clients by their score, the least first.

    The score is the sum of squared distances to the K - f - 2 nearest others: a vector among many
    alike has a small one.

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
            f"but {K} answered; raise cohort or lower aggregator.attackers"
        )
    # Differences, not a Gram matrix: an attacker far away must not round the others' distances.
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = apart.sort(dim=1).values[:, 1 : K - attackers - 1]
    return torch.argsort(nearest.sum(dim=1), stable=True)


def shortened(rows: torch.Tensor, start: torch.Tensor, bound: float) -> torch.Tensor:
    """Shorten the updates ``rows - start`` that are longer than ``bound`` to it.

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
