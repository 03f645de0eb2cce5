"""Subspace RAC-LoRA: Fed-RAC-LoRA whose frozen factor is taken from the links before it.

Link j = 0, 1, ... lasts for ``merge_every`` rounds; even links are right, odd ones left. Per
adapted matrix W (m x n), s = alpha / r, with k kept and f = r - k fresh rows, f = ceil(fresh r):

    right: A = [c K; F], K the k leading right singular vectors of the last link's change of W,
           F the rows of a drawing made orthonormal to K and to one another
           client i: trains B_i from B;  B = sum_i p_i B_i;  last round: W <- W + s B A
    left:  B = [c K, F] likewise, K of left singular vectors; clients train A

Each link turns the basis by the gradient once: subspace iteration with a warm start, along the
chain. The first link is drawn, or has its K from the gradient (`strategies.shared.initials`).
With ``pairs`` all other even links are drawn: each pair is one randomized range finder. With
``fresh = 1`` these are Fed-RAC-LoRA's links, of sides by turns.

- Uplink: r m numbers per matrix and client in right links, r n in left ones. Downlink: a seed, and
  where rows are kept 2 r^2 coefficients, by which clients compute the frozen factor from what the
  last link trained (`fedraclora.protocol.factor`), or it itself where that is less in float32, in
  a link from the gradient and under ``basis=coordinate``. (Fewer bits round it, but never
  coefficients, which may then be more.) Within a link the trained factor, too; and what the client
  missed: per link what was trained and coefficients, at most m n and what was trained last.
- Aggregation: exact and linear, since the factor that is not averaged is the same everywhere.
- Rank budgets: client i trains the first r_i components, those of the strongest directions. Exact.
- Ledger: ``energy_seen`` in the last round of a link with fresh rows: the estimated share of the
  gradient's energy in its basis (`fedraclora.strategies.shared.energies`), under local SGD.
- Under SGD set ``local.clip=1``: gradients along kept rows are long (docs/records/better.md).
- Server: one mean; per link and matrix an SVD, a QR, a least-squares fit to 2 r rows, a merge.
- Source: Malinovsky et al., 2024, arXiv 2410.08305 (the chain); Vogels et al., *PowerSGD*, NeurIPS
  2019, arXiv 1905.13727 (the iteration); Halko, Martinsson and Tropp, SIAM Review 53(2), 2011,
  doi 10.1137/090771806 (pairs); He et al., *GoLore*, arXiv 2410.11289 (why a share stays random).
- Departures: a method of this project, put together from these; no paper has it.
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
    """Return the labels of the frozen and of the trained factor of a link: right, then left."""
    return ("A", "B") if link % 2 == 0 else ("B", "A")


def trained_side(adapter: Adapter) -> str:
    """Return the label of the trained factor of what was asked."""
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
        """Build a frozen factor: K from the gradient, coordinates or the last link, and F."""
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
        """Return whether some rows of a frozen factor may come from the last link."""
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
        """Count the rows of a link that come from the one before it, k."""
        whole = self.pairs and link % 2 == 0 if link else not self.probe_rounds
        return 0 if whole else rank - ceil(self.fresh * rank)

    def length(self, rank: int, dim: int) -> float:
        """Compute c, the length of kept rows of ``dim`` numbers."""
        return (rank / dim) ** 0.25 if self.kept_scale == "auto" else float(self.kept_scale)

    @override
    def first_factor(self, layer: Layer, gradient: Product) -> Tree:
        return {"A": BASES[self.basis](gradient, "A", self.kept(layer.rank, 0))}

    @override
    def close_round(self, state: State, sent: RoundInstructions, got: Uplinks) -> State:
        after = super().close_round(state, sent, got)
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
    """Estimate the energy of a gradient G inside the basis of a link, and all of it.

    A step of SGD moves the component beside the row c_i a_i by a multiple of c_i G a_i, so that
    e_i = ||its component||^2 / c_i^2 stands for ||G a_i||^2, up to one factor. Fresh rows lie
    uniformly in the complement of the kept ones, which has d - k dimensions:

        seen = sum_i e_i,    whole = sum_{i <= k} e_i + (d - k) / (r - k) sum_{i > k} e_i

    Over the draw, whole is unbiased. Of several steps these are energies of the way that clients
    went; steps whose size does not follow the gradient's (adaptive ones, preconditioned ones) say
    nothing of it, and the ledger then has no such figure (`Method.gradient_figures`).

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


def report(
    terms: Mapping[str, Term], sent: RoundInstructions, kept: Mapping[str, int]
) -> dict[str, float]:
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
