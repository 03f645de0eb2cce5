"""Compute frozen factors from the change of the last merge."""

from __future__ import annotations

from functools import lru_cache

import torch

from fedraclora.lowrank.algebra import truncated_product
from fedraclora.protocol.change_of_basis import as_product
from fedraclora.protocol.factor import Factor, FactorLike, as_rows, combined, label_of
from fedraclora.protocol.link import Term, matrices
from fedraclora.sketch import SketchSpec

Change = tuple[FactorLike, ...]  # B and A of a merge, or equivalent factors
Kept = tuple[int, float]  # number of rows of a frozen factor that are kept, and their length
# singular values of a trained factor up to this share of the largest count as rounding errors
NOISE = 1e-6


def leading(change: Change, side: str, kept: int, least: float = 0.0) -> torch.Tensor:
    """Compute the leading left (side ``B``) or right (``A``) singular vectors of B A.

    Args:
        change: B and A.
        side: The side.
        kept: Most vectors.
        least: Vectors whose singular value is at most this share of the largest are left out.

    Returns:
        [m, k] or [k, n], float64, strongest first.
    """
    B, A = matrices(Term.of(change, 1.0))
    u, s, vt = truncated_product(B, A, kept)
    found = s > least * s[0] if least else s >= 0
    return u[:, found] if side == "B" else vt[found]


def completed(kept: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Append random rows to orthonormal ones, orthonormal to all others.

    Given the kept rows, the others span a uniform subspace of the complement: a rotation (for
    coordinates: a permutation) of the complement does not change the distribution of the drawing.

    Args:
        kept: [k, d]. Not modified.
        drawn: [rank, d], orthonormal rows, independent of the kept ones. Not modified.

    Returns:
        [rank, d], float64: the kept rows, made orthonormal in their order, then the others.
    """
    outside = torch.linalg.vector_norm(drawn - drawn @ kept.mT @ kept, dim=1) > 1e-6
    q, r = torch.linalg.qr(torch.cat([kept, drawn[outside][: len(drawn) - len(kept)]]).mT)
    return torch.where(r.diagonal() < 0, -q, q).mT


def lengths(rank: int, kept: Kept) -> torch.Tensor:
    """Return the lengths of frozen rows, [rank, 1]; kept rows come first."""
    count, length = kept
    return torch.tensor([length] * count + [1.0] * (rank - count), dtype=torch.float64)[:, None]


def framed(rows: torch.Tensor, drawing: SketchSpec, kept: Kept) -> torch.Tensor:
    """Complete the kept rows of a factor by drawn ones, and scale all to their lengths.

    Args:
        rows: Orthonormal, [k, d], float64; k is at most the number of kept rows. Not modified.
        drawing: The drawing of the other rows.
        kept: Number of kept rows, and their length.

    Returns:
        [rank, d], float64.
    """
    drawn = as_rows(drawing.draw(), label_of(drawing))
    return lengths(drawing.rank, kept) * completed(rows, drawn)


@lru_cache(maxsize=256)  # called in each round of a merge period, and for each evaluation
def factor(
    past: torch.Tensor, drawing: SketchSpec, before: Kept, kept: Kept, dtype: torch.dtype
) -> Factor:
    """Build a frozen factor from the factor trained before the last merge.

    The frozen rows then were orthogonal, so that s B A has the left singular vectors of B times
    their lengths; if A was trained, the right ones in the same way.

    Args:
        past: The trained factor, B [m, p] or A [p, n], which clients hold. Not modified.
        drawing: The drawing of fresh rows; its side is that of the factor.
        before: Number of kept rows of the last frozen factor, and their length.
        kept: The same for this factor.
        dtype: Type in which the factor is sent, if it is.

    Returns:
        A combination of the trained factor and the drawing; or the factor itself, if that needs no
        more bytes (of float32).
    """
    label = label_of(drawing)
    trained = past.to("cpu", torch.float64)
    held = as_rows(trained, label)
    change = as_product(label, trained, lengths(len(held), before)[:, 0].diag())
    found = as_rows(leading(change, label, kept[0], NOISE), label)
    rows = framed(found, drawing, kept)
    if smaller(len(held), *rows.shape):
        return combined(rows, past, drawing)
    return Factor.of(as_rows(rows, label).to(dtype))


def smaller(past: int, rank: int, dim: int) -> bool:
    """Check whether coefficients, of 8 bytes, take fewer than a factor of ``rank`` rows, of 4."""
    return 2 * (past + rank) < dim
