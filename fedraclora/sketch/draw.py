"""Random sketches: frozen factors that server and clients draw from a seed.

A right sketch is A [rank, dim] with dim = in features, a left sketch B [dim, rank] with dim =
out features. A round that trains the other factor moves the weights inside the range of the
projection ``H = A^T (A A^T)^+ A`` (right; left: the same from the other side), and the theory of
arXiv 2410.08305 rests on the extreme eigenvalues of E[H]: see `constants`.

The scale of a sketch sets the step: plain SGD with step size ``lr`` on B, under the weight
``W + s B A``, moves W by ``lr s^2 G A^T A``. With orthonormal rows that is a projected gradient
step of size ``lr s^2``; else ``A A^T`` is about ``gram_scale`` times I, and the step inside the
sketch is about ``lr s^2 gram_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import sqrt

import torch

from fedraclora.errors import ConfigError, unknown
from fedraclora.sketch.kinds import SKETCHES

SIDES = ("right", "left")
NORMALISATIONS = ("rows", "identity", "none")
BLOCKS = ("independent", "cover")
_SMALL = 1 << 17  # numbers in a drawing of 1 MiB


@dataclass(frozen=True)
class SketchSpec:
    """A sketch by its seed: equal specs give equal drawings, in any process.

    Attributes:
        kind: A key of `SKETCHES`.
        side: ``right``: A [rank, dim]; ``left``: B [dim, rank], the transpose of that drawing.
        rank: Rows of A. Kinds with orthonormal rows have at most ``dim``.
        dim: Numbers per row: in features (right) or out features (left).
        seed: 63 bits, one per layer and run.
        index: Number of the draw, from 0; with ``cover`` the number of the block.
        blocks: ``independent`` draws, or ``cover``: consecutive blocks of rows of an endless
            sequence of independent orthonormal bases, so that dim / rank rounds reach every
            direction once. A block that ends one basis and begins the next is orthonormalised
            and its span holds both parts. Above dim 1024, ``srht`` is much the faster cover.
        normalise: ``rows``: unit rows in expectation, ``E[A A^T] = I`` on the diagonal (exact
            for orthonormal kinds); ``identity``: ``E[A^T A] = I``, larger by sqrt(dim / rank);
            ``none``: as drawn.
        density: Probability of a non-zero entry; for ``sparse_sign`` only.

    Raises:
        ConfigError: On a name that does not exist or a number out of range.

    References:
        Malinovsky et al., arXiv 2410.08305. Each kind's own source is in `kinds` or
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
    normalise: str = "rows"
    density: float = 0.1

    def __post_init__(self) -> None:
        check_sketch(self.kind, self.normalise, self.blocks)
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
            float64, [rank, dim] (right) or [dim, rank] (left), on the CPU. The tensor is
            remembered and handed out again: do not modify it.

        Example:
            >>> SketchSpec("coordinate", "left", rank=1, dim=3, seed=7, index=0).draw().shape
            torch.Size([3, 1])
        """
        return _few(self) if self.rank * self.dim > _SMALL else _many(self)

    @property
    def gram_scale(self) -> float:
        """The c of ``E[A A^T] = c I`` (its mean diagonal): the effective step is lr s^2 c.

        Example:
            >>> SketchSpec("gaussian", "right", 2, 8, 0, 0, normalise="identity").gram_scale
            4.0
        """
        if self.normalise == "rows":
            return 1.0
        if self.normalise == "identity":
            return self.dim / self.rank
        return SKETCHES[self.kind].gram(self)


@dataclass(frozen=True)
class Sketches:
    """Consecutive sketches of one layer as one factor: rows below rows (left: columns by columns).

    Attributes:
        first: The first; the others have the numbers after its own.
        count: How many.

    Example:
        >>> one = SketchSpec("coordinate", "right", rank=2, dim=4, seed=7, index=0, blocks="cover")
        >>> Sketches(one, 2).draw().sum(dim=0)
        tensor([1., 1., 1., 1.], dtype=torch.float64)
    """

    first: SketchSpec
    count: int

    def draw(self) -> torch.Tensor:
        """Draw them all: float64, [count * rank, dim] (right) or [dim, count * rank] (left)."""
        each = (replace(self.first, index=self.first.index + j).draw() for j in range(self.count))
        return torch.cat(list(each), dim=0 if self.first.side == "right" else 1)


def _drawn(spec: SketchSpec) -> torch.Tensor:
    """Draw, normalise and turn a sketch."""
    kind = SKETCHES[spec.kind]
    if spec.blocks == "cover" and kind.basis is not None:
        rows = kind.basis.block(spec.seed, spec.dim, spec.rank, spec.index)
    else:
        rows = kind.draw((spec.seed, "block", spec.index), spec)
    if (stretch := sqrt(spec.gram_scale / kind.gram(spec))) != 1.0:
        rows = rows * stretch
    return (rows if spec.side == "right" else rows.mT).contiguous()


# A model has many small sketches, which a round draws several times, or a few large ones: two
# memories bound the bytes that are held whatever the shapes.
_many = lru_cache(maxsize=128)(_drawn)
_few = lru_cache(maxsize=4)(_drawn)


@dataclass(frozen=True)
class Constants:
    """Extreme eigenvalues of E[H], H the projection onto the row space of a sketch."""

    lambda_min: float
    lambda_max: float


def constants(spec: SketchSpec) -> Constants:
    """Compute the constants of the theory for a sketch, by formula.

    Independent draws: every kind here is invariant in law under signed permutations of the
    coordinates, or is a uniform subset of an orthonormal basis, so ``E[H] = (E[rank] / dim) I``.
    The mean rank of random signs is taken up to pairs of rows (`kinds.sign_rank`).

    A cover: given the blocks before it, a block misses directions for certain and may hit others
    for certain, so the constants are 0 and 1 and the theorems of arXiv 2410.08305 (which need
    ``lambda_min > 0``) say nothing; only with rank = dim are both 1.

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


def check_sketch(kind: str, normalise: str, blocks: str) -> None:
    """Check the names of a sketch before any shape is known.

    Args:
        kind: A key of `SKETCHES`.
        normalise: One of ``rows``, ``identity``, ``none``.
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
    if normalise not in NORMALISATIONS:
        raise unknown("normalisation of a sketch", normalise, NORMALISATIONS)
    if blocks not in BLOCKS:
        raise unknown("choice of blocks of a sketch", blocks, BLOCKS)
    if blocks == "cover" and SKETCHES[kind].basis is None:
        able = ", ".join(sorted(name for name, k in SKETCHES.items() if k.basis is not None))
        raise ConfigError(
            f"blocks: cover cuts orthonormal bases into blocks, and a {kind!r} sketch has none; "
            f"take one of {able}, or blocks: independent"
        )
