"""Draw random sketches: frozen factors that server and clients draw from a seed.

A right sketch is A [rank, dim] with dim = in features, a left sketch B [dim, rank] with dim =
out features. A round that trains the other factor moves the weights inside the range of the
projection ``H = A^T (A A^T)^+ A`` (right; left: the same from the other side), and the theory of
arXiv 2410.08305 rests on the extreme eigenvalues of E[H]: see `constants`.

The scale of a sketch sets the step: plain SGD with step size ``lr`` on B, under the weight
``W + s B A``, moves W by ``lr s^2 G A^T A``. With orthonormal rows that is a projected gradient
step of size ``lr s^2``; else ``A A^T`` is about ``gram_scale`` times I, and the step inside the
sketch is about ``lr s^2 gram_scale``.

Kinds that are drawn from raw integers have the same bits on every machine, so that a checksum can
verify them: all except ``gaussian`` and ``orthonormal``, and ``srht`` only if dim is a power of
two. A block of a cover with rows from two bases is computed by a QR, whose bits differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import comb, inf, sqrt
from typing import Annotated

import numpy as np
import torch

from fedraclora.errors import ConfigError, unknown
from fedraclora.limits import OneOf
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch.bases import COORDINATE, HAAR, SRHT, Basis, Leaf, signs, words

SIDES = ("right", "left")
NORMALIZATIONS = ("rows", "identity", "none")
BLOCKS = ("independent", "cover")


@dataclass(frozen=True)
class Kind:
    """Define a distribution of A [rank, dim], float64.

    Attributes:
        draw: (leaf of the seed tree, spec) -> A as drawn, before any normalization.
        gram: spec -> c of ``E[A A^T] = c I`` for A as drawn (its mean diagonal).
        mean_rank: spec -> E[rank A].
        basis: The basis of the kind, or None if rows are not orthonormal.
    """

    draw: Callable[[Leaf, SketchSpec], torch.Tensor]
    gram: Callable[[SketchSpec], float]
    mean_rank: Callable[[SketchSpec], float]
    basis: Basis | None = None


def frame(basis: Basis) -> Kind:
    """Build the kind of a basis: A is its first ``rank`` rows, so that ``A A^T = I``."""
    return Kind(
        draw=lambda leaf, spec: basis.rows(leaf, spec.dim, 0, spec.rank),
        gram=lambda spec: 1.0,  # noqa: ARG005
        mean_rank=full_rank,
        basis=basis,
    )


def gaussian(leaf: Leaf, spec: SketchSpec) -> torch.Tensor:
    """Draw independent N(0, 1) entries; the row space is uniformly distributed."""
    return torch_normal(generator(*leaf), spec.rank, spec.dim)


def rademacher(leaf: Leaf, spec: SketchSpec) -> torch.Tensor:
    """Draw independent signs +1, -1."""
    return torch.from_numpy(signs(words(generator(*leaf), spec.rank, spec.dim)))


def sparse_sign(leaf: Leaf, spec: SketchSpec) -> torch.Tensor:
    """Draw entries that are +1 or -1 with probability ``density`` (to 2^-32) and else 0."""
    drawn = words(generator(*leaf), spec.rank, spec.dim)
    threshold = np.uint64(round(spec.density * 2**32))
    nonzero = (drawn & np.uint64(0xFFFFFFFF)) < threshold
    return torch.from_numpy(np.where(nonzero, signs(drawn), 0.0))


def count_sketch(leaf: Leaf, spec: SketchSpec) -> torch.Tensor:
    """Draw one +1 or -1 per column, in a uniform row (its bias is below rank / 2^32).

    References:
        Charikar, Chen, Farach-Colton, *Finding frequent items in data streams*, ICALP 2002.
    """
    rng = generator(*leaf)
    low = words(rng, spec.dim) & np.uint64(0xFFFFFFFF)
    row = ((low * np.uint64(spec.rank)) >> np.uint64(32)).astype(np.int64)
    out = np.zeros((spec.rank, spec.dim))
    out[row, np.arange(spec.dim)] = signs(words(rng, spec.dim))
    return torch.from_numpy(out)


def kaiming_uniform(leaf: Leaf, spec: SketchSpec) -> torch.Tensor:
    """Draw uniform entries in [-1/sqrt(dim), 1/sqrt(dim)), variance 1 / (3 dim).

    The default of PEFT and of torch.nn.Linear: kaiming_uniform with a = sqrt(5).
    """
    # 53 bits, as many as a float64 holds: both steps are exact, the product is rounded once.
    drawn = words(generator(*leaf), spec.rank, spec.dim) >> np.uint64(11)
    unit = drawn.astype(np.float64) * 2.0**-53
    return torch.from_numpy((2.0 * unit - 1.0) * (1.0 / sqrt(spec.dim)))


def full_rank(spec: SketchSpec) -> float:
    """Rank of a kind that has full rank with probability one."""
    return float(min(spec.rank, spec.dim))


def count_rank(spec: SketchSpec) -> float:
    """Mean rank of CountSketch, r (1 - (1 - 1/r)^n): rows that some column fell into."""
    return spec.rank * (1.0 - (1.0 - 1.0 / spec.rank) ** spec.dim)


def sign_rank(rank: int, dim: int, density: float) -> float:
    """Mean rank of independent random signs, 1 with probability ``density``, up to pairs.

    It counts zero rows and pairs of rows that are equal up to sign. It neglects three or more
    dependent rows without such a pair, and the correction for several equal pairs at once; both
    vanish exponentially in ``dim``. At most min(rank, dim).

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
# Settings of methods.
Sketch = Annotated[str, OneOf(SKETCHES)]
Normalize = Annotated[str, OneOf(NORMALIZATIONS)]
Blocks = Annotated[str, OneOf(BLOCKS)]


@dataclass(frozen=True)
class SketchSpec:
    """Define a sketch by its seed: equal specs give equal sketches, in any process.

    Attributes:
        kind: A key of `SKETCHES`.
        side: ``right``: A [rank, dim]; ``left``: B [dim, rank], the transpose of that drawing.
        rank: Rows of A. Kinds with orthonormal rows have at most ``dim``.
        dim: Numbers per row: in features (right) or out features (left).
        seed: 63 bits, one per layer and run.
        index: Number of the draw, from 0; with ``cover`` the number of the block.
        blocks: ``independent`` draws, or ``cover``: consecutive blocks of rows of an endless
            sequence of independent orthonormal bases, so that dim / rank rounds reach every
            direction once. A block that ends one basis and begins the next is orthonormalized
            and its span contains both parts. Above dim 1024, ``srht`` is a much faster cover.
        normalize: ``rows``: unit rows in expectation, ``E[A A^T] = I`` on the diagonal (exact
            for orthonormal kinds); ``identity``: ``E[A^T A] = I``, larger by sqrt(dim / rank);
            ``none``: as drawn.
        density: Probability of a non-zero entry; for ``sparse_sign`` only.

    Raises:
        ConfigError: On a name that does not exist or a number out of range.

    References:
        Malinovsky et al., arXiv 2410.08305. Each kind's own source is with its law, or in
        `bases`.

    Example:
        >>> spec = SketchSpec("orthonormal", "right", rank=2, dim=5, seed=7, index=0)
        >>> A = spec.draw()
        >>> A.shape, bool(torch.allclose(A @ A.mT, torch.eye(2, dtype=torch.float64)))
        (torch.Size([2, 5]), True)
    """

    kind: str
    side: str
    rank: int
    dim: int
    seed: int
    index: int
    blocks: str = "independent"
    normalize: str = "rows"
    density: float = 0.1

    def __post_init__(self) -> None:
        check_sketch(self.kind, self.normalize, self.blocks)
        if self.side not in SIDES:
            raise unknown("sketch side", self.side, SIDES)
        if self.rank < 1 or self.dim < 1 or self.index < 0:
            raise ConfigError(
                f"a sketch needs rank >= 1, dim >= 1 and index >= 0, but has rank={self.rank}, "
                f"dim={self.dim}, index={self.index}"
            )
        if SKETCHES[self.kind].basis is not None and self.rank > self.dim:
            raise ConfigError(
                f"a sketch of kind {self.kind!r} has orthonormal rows, so rank={self.rank} "
                f"cannot exceed dim={self.dim}; lower the rank to {self.dim} or less"
            )
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"the density of a sketch is {self.density}; it must lie in (0, 1]")

    def draw(self) -> torch.Tensor:
        """Draw the sketch.

        Returns:
            float64, [rank, dim] (right) or [dim, rank] (left), on the CPU. The tensor is cached: do
            not modify it.

        Example:
            >>> SketchSpec("coordinate", "left", rank=1, dim=3, seed=7, index=0).draw().shape
            torch.Size([3, 1])
        """
        return next(draw for size, draw in _MEMORIES if self.rank * self.dim <= size)(self)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the sketch."""
        return (self.rank, self.dim) if self.side == "right" else (self.dim, self.rank)

    @property
    def gram_scale(self) -> float:
        """Return c of ``E[A A^T] = c I`` (its mean diagonal): the effective step is lr s^2 c.

        Example:
            >>> SketchSpec("gaussian", "right", 2, 8, 0, 0, normalize="identity").gram_scale
            4.0
        """
        if self.normalize == "rows":
            return 1.0
        if self.normalize == "identity":
            return self.dim / self.rank
        return SKETCHES[self.kind].gram(self)


def _drawn(spec: SketchSpec) -> torch.Tensor:
    """Draw, normalize and transpose a sketch."""
    kind = SKETCHES[spec.kind]
    if spec.blocks == "cover" and kind.basis is not None:
        rows = kind.basis.block(spec.seed, spec.dim, spec.rank, spec.index)
    else:
        rows = kind.draw((spec.seed, "block", spec.index), spec)
    if (stretch := sqrt(spec.gram_scale / kind.gram(spec))) != 1.0:
        rows = rows * stretch
    return (rows if spec.side == "right" else rows.mT).contiguous()


# A model has many small sketches, which a round draws several times, or a few large ones. The cache
# holds up to 128 MiB for the first two sizes, and four sketches of larger ones.
_MEMORIES = (
    (1 << 14, lru_cache(maxsize=1024)(_drawn)),
    (1 << 17, lru_cache(maxsize=128)(_drawn)),
    (inf, lru_cache(maxsize=4)(_drawn)),
)


@dataclass(frozen=True)
class Constants:
    """Hold the extreme eigenvalues of E[H], H the projection onto the row space of a sketch."""

    lambda_min: float
    lambda_max: float


def constants(spec: SketchSpec) -> Constants:
    """Compute the constants of the theory for a sketch by formula.

    Independent draws: every kind here is invariant in law under signed permutations of the
    coordinates, or is a uniform subset of an orthonormal basis, so ``E[H] = (E[rank] / dim) I``.
    The mean rank of random signs is taken up to pairs of rows (`sign_rank`).

    A cover: given the previous blocks, a block certainly misses some directions and may certainly
    hit others. So the constants are 0 and 1, and the theorems of arXiv 2410.08305 (which need
    ``lambda_min > 0``) do not apply; only with rank = dim are both 1.

    Args:
        spec: The sketch; seed and index do not matter.

    Returns:
        ``lambda_min`` and ``lambda_max`` in [0, 1].

    References:
        arXiv 2410.08305, assumption on ``lambda_min(E[H])``.

    Example:
        >>> constants(SketchSpec("gaussian", "right", rank=4, dim=16, seed=0, index=0))
        Constants(lambda_min=0.25, lambda_max=0.25)
    """
    if spec.blocks == "cover" and spec.rank < spec.dim:
        return Constants(0.0, 1.0)
    share = SKETCHES[spec.kind].mean_rank(spec) / spec.dim
    return Constants(share, share)


def check_sketch(kind: str, normalize: str, blocks: str) -> None:
    """Check the names of a sketch before any shape is known.

    Args:
        kind: A key of `SKETCHES`.
        normalize: One of ``rows``, ``identity``, ``none``.
        blocks: One of ``independent``, ``cover``.

    Raises:
        ConfigError: If a name does not exist, or a cover is asked of a kind without a basis.

    Example:
        >>> check_sketch("orthonormal", "rows", "cover")
        >>> check_sketch("gaussian", "rows", "cover")
        Traceback (most recent call last):
        fedraclora.errors.ConfigError: blocks: cover cuts orthonormal bases into blocks, and a
        'gaussian' sketch has none; take one of coordinate, orthonormal, srht, or blocks:
        independent
    """
    if kind not in SKETCHES:
        raise unknown("sketch", kind, SKETCHES)
    if normalize not in NORMALIZATIONS:
        raise unknown("normalization of a sketch", normalize, NORMALIZATIONS)
    if blocks not in BLOCKS:
        raise unknown("choice of blocks of a sketch", blocks, BLOCKS)
    if blocks == "cover" and SKETCHES[kind].basis is None:
        able = ", ".join(sorted(name for name, k in SKETCHES.items() if k.basis is not None))
        raise ConfigError(
            f"blocks: cover cuts orthonormal bases into blocks, and a {kind!r} sketch has none; "
            f"take one of {able}, or blocks: independent"
        )
