"""Subspace RAC-LoRA: Fed-RAC-LoRA whose frozen factor is computed from earlier merges.

Merge j = 0, 1, ... ends ``merge_every`` rounds; even merges have right sketches, odd ones left. Per
adapted matrix W (m x n), s = alpha / r, with k kept and f = r - k fresh rows, f = ceil(fresh r):

    right: A = [c K; F], K the k leading right singular vectors of the last merged update of W,
           F the rows of a drawing made orthonormal to K and to one another
           client i: trains B_i from B;  B = sum_i p_i B_i;  last round: W <- W + s B A
    left:  B = [c K, F] likewise, K of left singular vectors; clients train A

Each merge multiplies the basis by the gradient once: this is subspace iteration with a warm start.
The first frozen factor is drawn, or has its K from the gradient (`strategies.shared.initials`).
With ``pairs`` every second right factor is drawn whole, so that each pair of merges is a randomized
range finder. With ``fresh = 1`` the rounds are those of Fed-RAC-LoRA with alternating sides.

- Uplink: r m numbers per matrix and client under right sketches, r n under left ones.
- Downlink: a seed. If rows are kept, also 2 r^2 coefficients, from which clients compute the frozen
  factor with the factor trained last (`fedraclora.protocol.factor`). The frozen factor itself is
  sent if it is smaller in float32, if it comes from the gradient, and under ``basis=coordinate``.
  (Compression rounds it but never coefficients, which may then be the larger ones.) Between merges
  also the current trained factor. And the updates that the client missed: per merge the trained
  factor and coefficients; at most m n and the factor trained last.
- Aggregation: exact and linear, because all clients have the same frozen factor.
- Rank budgets: client i trains the first r_i components, those of the strongest directions. Exact.
- Ledger: ``energy_seen`` in the last round before a merge with fresh rows: the estimated share of
  the gradient's energy in its basis (`fedraclora.strategies.shared.energies`), under local SGD.
- Under SGD set ``local.clip=1``: gradients along kept rows are long (docs/records/better.md).
- Server: one mean; per merge and matrix an SVD, a QR, a least-squares fit to 2 r rows, a merge.
- Source: Malinovsky et al., 2024, arXiv 2410.08305 (the chain); Vogels et al., *PowerSGD*, NeurIPS
  2019, arXiv 1905.13727 (the iteration); Halko, Martinsson and Tropp, SIAM Review 53(2), 2011,
  doi 10.1137/090771806 (pairs); He et al., *GoLore*, arXiv 2410.11289 (why a share stays random).
- Departures: this project built the method from these parts; no paper has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated

import numpy as np
import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.limits import Count, Limit, OneOf, Share
from fedraclora.lowrank.algebra import Product
from fedraclora.protocol.factor import FactorLike, as_rows
from fedraclora.protocol.link import matrices
from fedraclora.protocol.method import Adapter, Link, Plan, RoundInstructions, State, Term, Traits
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.shared import past
from fedraclora.strategies.shared.initials import GradientFirst
from fedraclora.strategies.shared.layerwise import (
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
)
from fedraclora.tree import Tree

ENERGY = "energy_seen"  # a column of the ledger


def sides(link: int) -> tuple[str, str]:
    """Return the labels of the frozen and of the trained factor of a merge: right, then left."""
    return ("A", "B") if link % 2 == 0 else ("B", "A")


def trained_side(adapter: Adapter) -> str:
    """Return the label of the factor that these instructions train."""
    return next(label for label, asked in adapter.factors.items() if asked.trained)


def squared_lengths(change: past.Change, side: str, _kept: int = 0) -> torch.Tensor:
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


BASES: dict[str, Callable[[past.Change, str, int], torch.Tensor]] = {
    "singular": past.leading,
    "coordinate": squared_lengths,
}
KeptLength = Annotated[
    float | str,
    Limit(
        "auto, or a number in (0, 1],",
        lambda c: c == "auto" or (isinstance(c, float | int) and 0 < c <= 1),
    ),
]
FRESH_ROWS = {"singular": "orthonormal", "coordinate": "coordinate"}  # of the other rows
KeptBasis = Annotated[str, OneOf(BASES)]


@dataclass(frozen=True)
class SubspaceRacLora(GradientFirst):
    """Subspace RAC-LoRA: Fed-RAC-LoRA with frozen factors computed from earlier merges.

    Attributes:
        basis: ``singular``, or ``coordinate``: rows are unit vectors, the k kept ones drawn without
            replacement with chances as the squared length of their rows (columns) of the change.
        merge_every: Rounds between merges.
        fresh: Share of newly drawn rows, in [0, 1], rounded up: all at rank 1.
        pairs: Draw all rows in every even merge period.
        kept_scale: c, the length of kept rows in (0, 1], where fresh ones have length 1; ``auto``:
            (r / d)^(1/4) for rows of d numbers. ``local.precondition`` undoes it.
    """

    traits = Traits(exact=True, linear=True, merges=True, ranks=True, varies=True)
    gradient_figures = (ENERGY,)

    basis: KeptBasis = "singular"
    merge_every: Count = 2
    fresh: Share = 0.25
    pairs: bool = False
    kept_scale: KeptLength = "auto"

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        label, trained = sides(layer.link)
        drawing = now.sketch(layer, label, FRESH_ROWS[self.basis], index=layer.link)
        return {trained: layer.trained(trained), label: self.frozen(layer, label, drawing, now)}

    def frozen(
        self, layer: Layer, label: str, drawing: SketchSpec, now: RoundContext
    ) -> FactorLike:
        """Build a frozen factor: K from the gradient, coordinates or the last merge, and F."""
        count = self.kept(layer.rank, layer.link)
        kept = count, self.length(layer.rank, drawing.dim)
        if (found := layer.carried.get(label)) is not None:
            rows = as_rows(found.to(torch.float64), label)
            if self.basis == "coordinate":
                chances = rows[0].clamp(min=0)  # in few bits some may be rounded below zero
                rows = chosen(chances, count, now.generator("kept", layer.name, layer.link))
            return as_rows(past.framed(rows, drawing, kept), label).to(layer.dtype)
        if layer.past is None or not count:
            return drawing
        rank, other = len(as_rows(layer.past, label)), layer.shape["AB".index(label)]
        before = self.kept(rank, layer.link - 1), self.length(rank, other)
        return past.factor(layer.past, drawing, before, kept, layer.dtype)

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        trained = trained_side(replies.adapter)
        if not layer.ends:
            return LayerUpdate(carried=layer.carried | {trained: replies.mean(trained)})
        change, kept = tuple(replies.means().values()), self.kept(layer.rank, layer.link + 1)
        if kept and self.basis == "coordinate":
            return LayerUpdate({trained: squared_lengths(change, trained)}, change)
        return LayerUpdate(merged=change, keep=trained if kept else None)  # W <- W + s B A

    @property
    def keeps_rows(self) -> bool:
        """Return whether a frozen factor can have rows from the last merge."""
        if isinstance(self.rank, int):
            return self.kept(self.rank, 1) > 0
        return self.fresh < 1  # of a share of each layer's width

    @property
    @override
    def begins_with_last(self) -> bool:
        return self.keeps_rows

    @Feature(
        "rows of the last sketch that are kept",
        take="kept rows, and with this method.fresh and method.rank all rows are random",
        reads=("method.kept_scale", "method.pairs"),
    )
    def _keeps_some(self) -> bool:
        return self.keeps_rows

    def kept(self, rank: int, link: int) -> int:
        """Count the rows of a frozen factor that come from the merge before, k."""
        whole = self.pairs and link % 2 == 0 if link else not self.probe_rounds
        return 0 if whole else rank - ceil(self.fresh * rank)

    def length(self, rank: int, dim: int) -> float:
        """Compute c, the length of kept rows of ``dim`` numbers."""
        return (rank / dim) ** 0.25 if self.kept_scale == "auto" else float(self.kept_scale)

    @override
    def first_factor(self, layer: Layer, gradient: Product) -> Tree:
        return {"A": BASES[self.basis](gradient, "A", self.kept(layer.rank, 0))}

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        after = super().close_round(state, sent, uplinks)
        terms, link = (after.link or Link()).terms, state.counters.sketch
        kept = {name: self.kept(self.rank_of(state.plan, name), link) for name in terms}
        return replace(after, report=after.report | report(terms, sent, kept))

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        up, down = super().floats(plan, round_)
        link = (round_ - 1 - self.probe_rounds) // self.merge_every
        side = "BA".index(sides(link)[0])
        frozen = [(self.rank_of(plan, n), view.shape[side]) for n, view in plan.targets.items()]
        kept = [pair for pair in frozen if link > 0 and self.kept(pair[0], link)]
        return up, down + sum(numbers(r, d, self.basis) for r, d in kept)

    @Feature("method.fresh below 1", reads=("method.init",))
    def _keeps_rows_at_first(self) -> bool:
        return self.fresh < 1


def numbers(rank: int, dim: int, basis: str) -> int:
    """Count the numbers that are sent for a frozen factor of [rank, dim] that is not drawn."""
    few = basis == "singular" and past.smaller(rank, rank, dim)
    return rank * (2 * rank if few else dim)


def energies(term: Term, trained: str, kept: int) -> torch.Tensor:
    """Estimate the energy of a gradient G inside the basis of a merge, and its whole energy.

    A step of SGD moves the component beside the row c_i a_i by a multiple of c_i G a_i. Therefore
    e_i = ||its component||^2 / c_i^2 estimates ||G a_i||^2, up to one factor. Fresh rows are
    uniform in the complement of the kept ones, which has d - k dimensions:

        seen = sum_i e_i,    whole = sum_{i <= k} e_i + (d - k) / (r - k) sum_{i > k} e_i

    Over the draw, whole is unbiased. After several steps these are energies of the sum of the
    clients' steps. Steps that are not proportional to the gradient (adaptive or preconditioned
    ones) tell nothing of it; the ledger then has no such figure (`Method.gradient_figures`).

    Args:
        term: Of the merge: two factors and s.
        trained: Label of the trained factor.
        kept: k.

    Returns:
        (seen, whole), divided by s^2; whole is infinite or NaN if no row is fresh.
    """
    B, A = matrices(term)
    rows, components = (A, B.mT) if trained == "B" else (B.mT, A)
    e = components.square().sum(dim=1) / rows.square().sum(dim=1) / term.scale**2
    (rank, d), old, new = rows.shape, e[:kept].sum(), e[kept:].sum()
    return torch.stack([old + new, old + (d - kept) * new / (rank - kept)])


def report(
    terms: Mapping[str, Term], sent: RoundInstructions, kept: Mapping[str, int]
) -> dict[str, float]:
    """Compute the figure for the ledger, ``energy_seen``, of the terms of a merge.

    It is left out if a layer has no fresh rows, since nothing is known outside the kept ones. It
    is left out under budgets below the rank, too: fresh components come last, and few clients
    train them.
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
