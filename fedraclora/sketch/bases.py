"""Draw random orthonormal bases, a few rows at a time, and cut them into blocks.

Draws from raw integers use the words of the bit generator directly (`words`): numpy keeps those
stable over releases, and all further steps are integer arithmetic or correctly rounded, so the bits
are the same on every machine. Normals, matrix decompositions and cosines
differ in the last bit between processors and builds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import pi, sqrt

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.rng import generator, torch_normal

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Leaf = tuple[int, str, int]  # seed, purpose and number: the arguments of `rng.generator`
Rows = Callable[[Leaf, int, int, int], torch.Tensor]
_STORED = 1024  # largest dim for which a whole Haar basis is cached (8 MiB)


@dataclass(frozen=True)
class Basis:
    """Define a distribution of orthonormal bases of R^dim.

    Attributes:
        rows: (leaf of the seed tree, dim, start, stop) -> rows start..stop-1 of its basis,
            [stop - start, dim].
        join: (leaf, leaf of the next basis, dim, start, rank) -> ``rank`` orthonormal rows
            whose span contains rows start..dim-1 of the first basis and the first rows of the
            second, as many as needed.
    """

    rows: Rows
    join: Callable[[Leaf, Leaf, int, int, int], torch.Tensor]

    def block(self, seed: int, dim: int, rank: int, index: int) -> torch.Tensor:
        """Cut block ``index`` out of an endless sequence of independent bases.

        Args:
            seed: Seed of the sequence.
            dim: Rows of each basis.
            rank: Rows of a block, at most ``dim``.
            index: Rows index * rank and on are taken.

        Returns:
            [rank, dim], orthonormal rows, computed without earlier blocks or bases.
        """
        number, start = divmod(index * rank, dim)
        leaf = (seed, "basis", number)
        if start + rank <= dim:
            return self.rows(leaf, dim, start, start + rank)
        return self.join(leaf, (seed, "basis", number + 1), dim, start, rank)


def words(rng: np.random.Generator, *shape: int) -> Words:
    """Draw raw 64-bit words of the bit generator, uint64 of the given shape."""
    return np.asarray(rng.bit_generator.random_raw(shape), dtype=np.uint64)


def signs(drawn: Words) -> npt.NDArray[np.float64]:
    """Map the top bit of each word to +1 or -1."""
    return 1.0 - 2.0 * (drawn >> np.uint64(63)).astype(np.float64)


def permutation(rng: np.random.Generator, dim: int) -> Integers:
    """Draw a permutation of 0..dim-1: the sorting order of ``dim`` words (stable for equal words).

    Example:
        >>> sorted(permutation(generator(0, "doctest"), 4).tolist())
        [0, 1, 2, 3]
    """
    return np.argsort(words(rng, dim), kind="stable").astype(np.int64)


def haar_rows(leaf: Leaf, dim: int, start: int, stop: int) -> torch.Tensor:
    """Draw rows of a uniformly distributed (Haar) orthogonal matrix, [stop - start, dim].

    This is the QR decomposition of a square Gaussian matrix, with signs such that R has a positive
    diagonal, but without the matrix: the part of a column that a Householder step uses is again
    Gaussian and independent of earlier steps, so it is drawn when needed. Rows 0..r-1 cost as
    much as the reduced QR of a [dim, r] matrix; later rows need all earlier reflections, so up to
    dim 1024 the whole basis is computed and cached.

    References:
        Stewart, *The efficient generation of random orthogonal matrices*, SIAM J. Numer. Anal.
        17(3), 1980. Mezzadri, arXiv math-ph/0609050 (why the signs must be fixed).

    Example:
        >>> whole = haar_rows((0, "doctest", 0), 5, 0, 5)
        >>> bool(torch.allclose(whole[3:], haar_rows((0, "doctest", 0), 5, 3, 5)))
        True
    """
    if start == 0 or dim > _STORED:
        return _haar(leaf, dim, start, stop)
    return _haar_basis(leaf, dim)[start:stop]


def _haar(leaf: Leaf, dim: int, start: int, stop: int) -> torch.Tensor:
    """Apply the first ``stop`` random reflections to unit vectors start..stop-1."""
    low = torch_normal(generator(*leaf), stop, dim).mT.tril()
    head = low.diagonal()
    # LAPACK's convention: H = I - tau v v^T with v[0] = 1 maps the column to (-beta, 0, ..., 0).
    beta = torch.copysign(torch.linalg.vector_norm(low, dim=0), head)
    first = head + beta
    reflectors, tau = low / first, first / beta
    if start == 0:  # the first columns of the product, at half the operations
        columns: torch.Tensor = torch.linalg.householder_product(reflectors, tau)
    else:
        unit = torch.eye(stop, dim, dtype=low.dtype)[start:]
        columns = torch.ormqr(reflectors, tau, unit.mT)
    return (columns * beta[start:].neg().sign()).mT


@lru_cache(maxsize=128)
def _haar_basis(leaf: Leaf, dim: int) -> torch.Tensor:
    """Draw a whole basis, cached, since one per layer is in use at a time."""
    return _haar(leaf, dim, 0, dim).contiguous()


def coordinate_rows(leaf: Leaf, dim: int, start: int, stop: int) -> torch.Tensor:
    """Draw unit rows e_i, i from ``start`` to ``stop`` of a random permutation.

    Example:
        >>> coordinate_rows((0, "doctest", 0), 5, 1, 4).sum(dim=1)
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    return _unit_rows(permutation(generator(*leaf), dim)[start:stop], dim)


def srht_rows(leaf: Leaf, dim: int, start: int, stop: int) -> torch.Tensor:
    """Draw rows, in random order, of F D: F a fixed orthonormal transform, D random signs.

    F is Sylvester's Hadamard matrix over sqrt(dim) if dim is a power of two (a subsampled
    randomized Hadamard transform), else the orthonormal DCT-II.

    References:
        Ailon & Chazelle, *The fast Johnson-Lindenstrauss transform*, SIAM J. Comput. 39(1),
        2009. Tropp, arXiv 1011.1595.

    Example:
        >>> srht_rows((0, "doctest", 0), 4, 0, 2).abs()
        tensor([[0.5000, 0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    rng = generator(*leaf)
    row = permutation(rng, dim)[start:stop, None]
    flips = signs(words(rng, dim))
    column = np.arange(dim, dtype=np.int64)
    if dim & (dim - 1) == 0:  # a power of two
        transform = (1.0 - 2.0 * _parity(row & column)) * (1.0 / sqrt(dim))
    else:
        # The angle is reduced in integers (a full turn is 4 dim), without rounding.
        angle = (pi / (2 * dim)) * (((2 * column + 1) * row) % (4 * dim))
        transform = np.cos(angle) * np.sqrt(np.where(row == 0, 1.0, 2.0) / dim)
    return torch.from_numpy(transform * flips)


def _parity(values: Integers) -> Integers:
    """Compute the parity of the number of ones in each value."""
    for shift in (32, 16, 8, 4, 2, 1):
        values = values ^ (values >> shift)
    return values & 1


def _unit_rows(chosen: Integers, dim: int) -> torch.Tensor:
    """Build rows e_i for the chosen coordinates."""
    out = torch.zeros(len(chosen), dim, dtype=torch.float64)
    out[torch.arange(len(chosen)), torch.from_numpy(chosen)] = 1.0
    return out


def coordinate_join(old: Leaf, new: Leaf, dim: int, start: int, rank: int) -> torch.Tensor:
    """Join two permutations: the rest of the old, then the first entries of the new not in it."""
    rest, fresh = permutation(generator(*old), dim)[start:], permutation(generator(*new), dim)
    chosen = np.concatenate([rest, fresh[~np.isin(fresh, rest)]])
    return _unit_rows(chosen[:rank], dim)


def qr_join(rows: Rows, old: Leaf, new: Leaf, dim: int, start: int, rank: int) -> torch.Tensor:
    """Join two bases: the rest of the old, then the first rows of the new, orthogonalized.

    By Householder QR: Q is orthonormal, and its range contains all rows, even if they are linearly
    dependent (additional columns are then some completion).
    """
    rest = rows(old, dim, start, dim)
    q, r = torch.linalg.qr(torch.cat([rest, rows(new, dim, 0, rank - len(rest))]).mT)
    return torch.where(r.diagonal() < 0, -q, q).mT


HAAR = Basis(haar_rows, partial(qr_join, haar_rows))
SRHT = Basis(srht_rows, partial(qr_join, srht_rows))
COORDINATE = Basis(coordinate_rows, coordinate_join)
