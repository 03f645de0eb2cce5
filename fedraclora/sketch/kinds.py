"""The laws of random sketches: how each kind is drawn, its scale, its expected rank.

Kinds that are drawn from raw integers have the same bits on every machine, so that a digest can
prove them: all but ``gaussian`` and ``orthonormal``, and ``srht`` where dim is a power of two. A
block of a cover that takes rows from two bases goes through a QR, and has not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, sqrt
from typing import Protocol

import numpy as np
import torch

from fedraclora.rng import generator, torch_normal
from fedraclora.sketch.bases import COORDINATE, HAAR, SRHT, Basis, Leaf, signs, words


class Size(Protocol):
    """What a law depends on: ``rank`` rows of ``dim`` numbers, and the density of the sparse."""

    @property
    def rank(self) -> int:
        """Rows."""

    @property
    def dim(self) -> int:
        """Numbers per row."""

    @property
    def density(self) -> float:
        """Probability that an entry of a sparse sketch is not zero."""


@dataclass(frozen=True)
class Kind:
    """One law of A [rank, dim], float64.

    Attributes:
        draw: (leaf of the seed tree, size) -> A as drawn, before any normalisation.
        gram: size -> c of ``E[A A^T] = c I`` for A as drawn (its mean diagonal).
        mean_rank: size -> E[rank A].
        basis: The basis behind the kind, or None where rows are not orthonormal.
    """

    draw: Callable[[Leaf, Size], torch.Tensor]
    gram: Callable[[Size], float]
    mean_rank: Callable[[Size], float]
    basis: Basis | None = None


def frame(basis: Basis) -> Kind:
    """Build the kind of a basis: A is its first ``rank`` rows, so ``A A^T = I``."""
    return Kind(
        draw=lambda leaf, size: basis.rows(leaf, size.dim, 0, size.rank),
        gram=lambda size: 1.0,  # noqa: ARG005
        mean_rank=full_rank,
        basis=basis,
    )


def gaussian(leaf: Leaf, size: Size) -> torch.Tensor:
    """Draw independent N(0, 1) entries; the row space is uniformly distributed."""
    return torch_normal(generator(*leaf), size.rank, size.dim)


def rademacher(leaf: Leaf, size: Size) -> torch.Tensor:
    """Draw independent signs +1, -1."""
    return torch.from_numpy(signs(words(generator(*leaf), size.rank, size.dim)))


def sparse_sign(leaf: Leaf, size: Size) -> torch.Tensor:
    """Draw entries that are +1 or -1 with probability ``density`` (to 2^-32) and else 0."""
    drawn = words(generator(*leaf), size.rank, size.dim)
    threshold = np.uint64(round(size.density * 2**32))
    nonzero = (drawn & np.uint64(0xFFFFFFFF)) < threshold
    return torch.from_numpy(np.where(nonzero, signs(drawn), 0.0))


def count_sketch(leaf: Leaf, size: Size) -> torch.Tensor:
    """Draw one +1 or -1 per column, in a uniform row (its bias is below rank / 2^32).

    References:
        Charikar, Chen, Farach-Colton, *Finding frequent items in data streams*, ICALP 2002.
    """
    rng = generator(*leaf)
    low = words(rng, size.dim) & np.uint64(0xFFFFFFFF)
    row = ((low * np.uint64(size.rank)) >> np.uint64(32)).astype(np.int64)
    out = np.zeros((size.rank, size.dim))
    out[row, np.arange(size.dim)] = signs(words(rng, size.dim))
    return torch.from_numpy(out)


def kaiming_uniform(leaf: Leaf, size: Size) -> torch.Tensor:
    """Draw uniform entries in [-1/sqrt(dim), 1/sqrt(dim)), variance 1 / (3 dim).

    The default of PEFT and of torch.nn.Linear: kaiming_uniform with a = sqrt(5).
    """
    # 53 bits, as many as a float64 holds: both steps are exact, the product is rounded once.
    drawn = words(generator(*leaf), size.rank, size.dim) >> np.uint64(11)
    unit = drawn.astype(np.float64) * 2.0**-53
    return torch.from_numpy((2.0 * unit - 1.0) * (1.0 / sqrt(size.dim)))


def full_rank(size: Size) -> float:
    """Rank of a kind that has full rank with probability one."""
    return float(min(size.rank, size.dim))


def count_rank(size: Size) -> float:
    """Mean rank of CountSketch, r (1 - (1 - 1/r)^n): rows that some column fell into."""
    return size.rank * (1.0 - (1.0 - 1.0 / size.rank) ** size.dim)


def sign_rank(rank: int, dim: int, density: float) -> float:
    """Mean rank of independent random signs, 1 with probability ``density``, up to pairs.

    Counts rows that vanish and pairs of rows that are equal up to sign. Left out: three and
    more rows that depend on one another without such a pair, and the correction for several
    equal pairs at once; both vanish exponentially in ``dim``. At most min(rank, dim).

    Example:
        >>> sign_rank(rank=2, dim=1, density=1.0), sign_rank(rank=1, dim=2, density=0.5)
        (1.0, 0.75)
    """
    vanish = (1.0 - density) ** dim
    agree = ((1.0 - density) ** 2 + density**2 / 2.0) ** dim
    mean = rank * (1.0 - vanish) - comb(rank, 2) * 2.0 * (agree - vanish**2)
    return min(max(mean, 0.0), float(min(rank, dim)))


SKETCHES: dict[str, Kind] = {
    "orthonormal": frame(HAAR),
    "coordinate": frame(COORDINATE),
    "srht": frame(SRHT),
    "gaussian": Kind(gaussian, lambda s: float(s.dim), full_rank),
    "kaiming_uniform": Kind(kaiming_uniform, lambda s: 1.0 / 3.0, full_rank),  # noqa: ARG005
    "rademacher": Kind(rademacher, lambda s: float(s.dim), lambda s: sign_rank(s.rank, s.dim, 1.0)),
    "sparse_sign": Kind(
        sparse_sign, lambda s: s.density * s.dim, lambda s: sign_rank(s.rank, s.dim, s.density)
    ),
    "count_sketch": Kind(count_sketch, lambda s: s.dim / s.rank, count_rank),
}
