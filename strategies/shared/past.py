"""Frozen factors taken from the change that the last link made: what is kept, what is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
import torch

from fedraclora.lowrank.algebra import truncated_product
from fedraclora.protocol.change_of_basis import as_product
from fedraclora.protocol.factor import Factor, FactorLike, as_rows, combined, label_of
from fedraclora.protocol.link import Term, matrices
from fedraclora.protocol.method import Adapter, Downlink
from fedraclora.sketch import SketchSpec

Change = tuple[FactorLike, ...]  # B and A of a link, or what stands for them
Kept = tuple[int, float]  # how many rows of a frozen factor come from before, and their length
ENERGY = "energy_seen"  # a column of the ledger
NOISE = 1e-6  # singular values of a trained factor up to this share of the largest are rounding


def sides(link: int) -> tuple[str, str]:
    """Return the labels of the frozen and of the trained factor of a link: right, then left."""
    return ("A", "B") if link % 2 == 0 else ("B", "A")


def trained_side(adapter: Adapter) -> str:
    """Return the label of the trained factor of what was asked."""
    return next(label for label, asked in adapter.factors.items() if asked.trained)


def leading(change: Change, side: str, kept: int, least: float = 0.0) -> torch.Tensor:
    """Compute the leading left (side ``B``) or right (``A``) singular vectors of B A.

    Args:
        change: B and A.
        side: Which.
        kept: How many at most.
        least: Those whose singular value is no more than this share of the largest are left out.

    Returns:
        [m, k] or [k, n], float64, strongest first.
    """
    B, A = matrices(Term.of(change, 1.0))
    u, s, vt = truncated_product(B, A, kept)
    found = s > least * s[0] if least else s >= 0
    return u[:, found] if side == "B" else vt[found]


def squared_lengths(change: Change, side: str, _kept: int = 0) -> torch.Tensor:
    """Compute the squared lengths of the rows (side ``B``) or columns (``A``) of B A.

    Returns:
        [m, 1] or [1, n], float64; ``chosen`` draws the kept ones by them.
    """
    B, A = matrices(Term.of(change, 1.0))
    squares = (B @ (A @ A.mT) * B).sum(dim=1) if side == "B" else (B.mT @ B @ A * A).sum(dim=0)
    return as_rows(squares[None], side)


def chosen(weights: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Draw coordinates without replacement, one after another, with chances as their weights.

    Args:
        weights: [d], not negative. Not modified.
        count: How many.
        rng: Decides.

    Returns:
        Unit rows, [count, d].

    References:
        Efraimidis and Spirakis, Information Processing Letters 97(5), 2006, doi
        10.1016/j.ipl.2005.11.003: the first of exponential clocks with these rates.
    """
    uniform = torch.from_numpy(rng.random(len(weights)))
    first = (-torch.log1p(-uniform) / weights).argsort(stable=True)[:count]
    return torch.eye(len(weights), dtype=torch.float64)[first]


BASES: dict[str, Callable[[Change, str, int], torch.Tensor]] = {
    "singular": leading,
    "coordinate": squared_lengths,
}


def completed(kept: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Append random rows to orthonormal ones, orthonormal to them and to one another.

    Given the kept rows, the others span a uniform subspace of the complement: a rotation (for
    coordinates: a permutation) of the complement leaves the law of the drawing as it is.

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
    """Return the lengths of frozen rows, [rank, 1]: those of the kept ones, which come first."""
    count, length = kept
    return torch.tensor([length] * count + [1.0] * (rank - count), dtype=torch.float64)[:, None]


def framed(rows: torch.Tensor, drawing: SketchSpec, kept: Kept) -> torch.Tensor:
    """Complete the kept rows of a factor by drawn ones, and give all their lengths.

    Args:
        rows: Orthonormal, [k, d], float64; k is at most as many as are to be kept. Not modified.
        drawing: Gives the others.
        kept: How many rows are kept ones, and their length.

    Returns:
        [rank, d], float64.
    """
    drawn = as_rows(drawing.draw(), label_of(drawing))
    return lengths(drawing.rank, kept) * completed(rows, drawn)


@lru_cache(maxsize=256)  # asked for in each round of a link, and for each evaluation
def factor(
    past: torch.Tensor, drawing: SketchSpec, before: Kept, kept: Kept, dtype: torch.dtype
) -> Factor:
    """Build the frozen factor of a link from what the one before it trained.

    The frozen rows of that were orthogonal, so that s B A has the left singular vectors of B times
    their lengths; where A was trained, the right ones likewise.

    Args:
        past: What was trained, B [m, p] or A [p, n], which clients hold. Not modified.
        drawing: Gives the fresh rows; its side is that of the factor.
        before: Of the last link: how many of its frozen rows were kept ones, and their length.
        kept: The same of this link.
        dtype: In which the factor is sent where it is.

    Returns:
        A combination of what the last link trained and of the drawing; or the factor itself, where
        that is no more bytes (of float32).
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


def numbers(rank: int, dim: int, basis: str) -> int:
    """Count the numbers that are sent for a frozen factor of [rank, dim] that is not drawn."""
    few = basis == "singular" and smaller(rank, rank, dim)
    return rank * (2 * rank if few else dim)


def energies(term: Term, trained: str, kept: int) -> torch.Tensor:
    """Estimate the energy of a gradient G inside the basis of a link, and all of it.

    A step of SGD moves the component beside the row c_i a_i by a multiple of c_i G a_i, so that
    e_i = ||its component||^2 / c_i^2 stands for ||G a_i||^2, up to one factor. Fresh rows lie
    uniformly in the complement of the kept ones, which has d - k dimensions:

        seen = sum_i e_i,    whole = sum_{i <= k} e_i + (d - k) / (r - k) sum_{i > k} e_i

    Over the draw, whole is unbiased. Of several steps these are energies of the way that clients
    went; steps whose size does not follow the gradient's (adaptive ones, preconditioned ones) say
    nothing of it, and the ledger then has no such figure (`fedraclora.strategies.steps.local`).

    Args:
        term: Of the link: two factors and s.
        trained: Label of the one that was trained.
        kept: k.

    Returns:
        (seen, whole), divided by s^2; whole is infinite or no number where no row is fresh.
    """
    B, A = matrices(term)
    rows, components = (A, B.mT) if trained == "B" else (B.mT, A)
    e = components.square().sum(dim=1) / rows.square().sum(dim=1) / term.scale**2
    (rank, d), old, new = rows.shape, e[:kept].sum(), e[kept:].sum()
    return torch.stack([old + new, old + (d - kept) * new / (rank - kept)])


def report(terms: Mapping[str, Term], sent: Downlink, kept: Mapping[str, int]) -> dict[str, float]:
    """Compute the figure for the ledger, ``energy_seen``, of the terms of a link that has ended.

    There is none where a layer has no fresh rows, since nothing is known of what lies outside, and
    under budgets below the rank: fresh components are the last, which few clients have trained.
    """
    energy = torch.zeros(2, dtype=torch.float64)
    for name, term in terms.items():
        label = trained_side(sent.adapters[name])
        energy += energies(term, label, kept[name])
        rank = sent.trained()[f"{name}/{label}"].shape["AB".index(label)]
        if sent.ranks is not None and int(sent.ranks.min()) < rank:
            return {}
    share = float(energy[0] / energy[1])
    return {ENERGY: share} if share > 0 else {}
