"""Frozen factors taken from the change that the last link made: what is kept, what is drawn."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedraclora.lowrank.algebra import truncated_product
from fedraclora.protocol.link import Term, matrices
from fedraclora.protocol.method import Adapter, Downlink, Trained
from strategies.shared.layer import Value

Change = tuple[Value, Value]  # B and A of a link
ENERGY = "energy_seen"  # a column of the ledger


def sides(link: int) -> tuple[str, str]:
    """Return the labels of the frozen and of the trained factor of a link: right, then left."""
    return ("A", "B") if link % 2 == 0 else ("B", "A")


def trained_side(adapter: Adapter) -> str:
    """Return the label of the trained factor of what was asked."""
    return next(k for k, factor in adapter.factors.items() if isinstance(factor, Trained))


def as_rows(factor: torch.Tensor, label: str) -> torch.Tensor:
    """Turn B so that its components are rows, as those of A are; and back."""
    return factor.mT if label == "B" else factor


def leading(change: Change, side: str, kept: int) -> torch.Tensor:
    """Compute the leading left (side ``B``) or right (``A``) singular vectors of B A.

    Returns:
        [m, kept] or [kept, n], float64, strongest first.
    """
    B, A = matrices(Term(change, 1.0))
    u, _, vt = truncated_product(B, A, kept)
    return u if side == "B" else vt


def squared_lengths(change: Change, side: str, _kept: int) -> torch.Tensor:
    """Compute the squared lengths of the rows (side ``B``) or columns (``A``) of B A.

    Returns:
        [m, 1] or [1, n], float64; ``chosen`` draws the kept ones by them.
    """
    B, A = matrices(Term(change, 1.0))
    squares = (B @ (A @ A.mT) * B).sum(dim=1) if side == "B" else (B.mT @ B @ A * A).sum(dim=0)
    return as_rows(squares[None], side)


def chosen(weights: torch.Tensor, count: int, uniform: torch.Tensor) -> torch.Tensor:
    """Draw coordinates without replacement, one after another, with chances as their weights.

    Args:
        weights: [d], not negative. Not modified.
        count: How many.
        uniform: Numbers of [0, 1) that decide, [d].

    Returns:
        Unit rows, [count, d].

    References:
        Efraimidis and Spirakis, Information Processing Letters 97(5), 2006, doi
        10.1016/j.ipl.2005.11.003: the first of exponential clocks with these rates.
    """
    first = (-torch.log1p(-uniform) / weights).argsort(stable=True)[:count]
    return torch.eye(len(weights), dtype=torch.float64)[first]


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


def energies(term: Term, trained: str, kept: int) -> torch.Tensor:
    """Estimate the energy of a gradient G inside the basis of a link, and all of it.

    A step of SGD moves the component beside the row c_i a_i by a multiple of c_i G a_i, so that
    e_i = ||its component||^2 / c_i^2 stands for ||G a_i||^2, up to one factor. Fresh rows lie
    uniformly in the complement of the kept ones, which has d - k dimensions:

        seen = sum_i e_i,    whole = sum_{i <= k} e_i + (d - k) / (r - k) sum_{i > k} e_i

    Over the draw, whole is unbiased. Of several steps these are energies of the way that clients
    went; steps whose size does not follow the gradient's (adaptive ones, preconditioned ones) say
    nothing of it, and the ledger then has no such figure (`strategies.steps.energy`).

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
