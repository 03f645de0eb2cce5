"""Subspace RAC-LoRA: Fed-RAC-LoRA whose frozen factor is taken from the links before it.

Link j = 0, 1, ... lasts for ``resample_every`` rounds; even links are right, odd ones left. Per
adapted matrix W (m x n), s = alpha / r, with k kept and f = r - k fresh rows, f = ceil(fresh r):

    right: A = [c K; F], K the k leading right singular vectors of the last link's change of W,
           F the rows of a drawing made orthonormal to K and to one another
           client i: local steps on B_i from B;  B = sum_i p_i B_i;  last round: W <- W + s B A
    left:  B = [c K, F] likewise, K of left singular vectors; clients train A

Each link turns the basis by the gradient once: subspace iteration with a warm start, along the
chain. The first link is drawn. With ``pairs`` all even links are: each pair is one randomised range
finder. With ``fresh = 1`` these are Fed-RAC-LoRA's links, of both sides by turns.

- Uplink: r m numbers per matrix and client in right links, r n in left ones. Downlink: a seed where
  the frozen factor is drawn, else the factor: r n numbers in right links, r m in left ones; within
  a link the trained factor, too; and what the client missed: r (m + n) numbers per link (a drawing
  is a seed there, too), at most m n. The server computes the factor once and sends it. Singular
  vectors that clients computed themselves would differ by rounding between machines, and a client
  that catches up by whole weights holds no link to compute them from.
- Aggregation: exact and linear, since the factor that is not averaged is the same everywhere.
- Rank budgets: client i trains the first r_i components, those of the strongest directions. Exact.
- Ledger: ``energy_seen`` in the last round of a link with fresh rows: the estimated share of the
  gradient's energy that lies in its basis (`energies`).
- Server: one mean, per link and matrix two QRs, an SVD of an r x r matrix and a merge.
- Source: Malinovsky et al., 2024, arXiv 2410.08305 (the chain); Vogels et al., *PowerSGD*, NeurIPS
  2019, arXiv 1905.13727 (the iteration); Halko, Martinsson and Tropp, SIAM Review 53(2), 2011,
  doi 10.1137/090771806 (pairs); He et al., *GoLore*, arXiv 2410.11289 (why a share stays random).
- Departures: a method of this project, put together from these; no paper has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError, unknown
from fedraclora.lowrank.algebra import truncated_product
from fedraclora.protocol.link import Link, Term, matrices
from fedraclora.protocol.method import Adapter, Downlink, Plan, State, Trained, Traits
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from strategies.shared.layer import Value
from strategies.shared.layerwise import Factors, Layer, LayerMethod, LayerUpdate, Replies, Round

BASES = {"singular": "orthonormal", "coordinate": "coordinate"}  # and how fresh rows are drawn


@dataclass(frozen=True)
class SubspaceRacLora(LayerMethod):
    """Hyperparameters, beside those of `LowRank`.

    Attributes:
        basis: ``singular``, or ``coordinate``: rows are unit vectors, the k kept ones drawn without
            replacement with chances as the squared length of their rows (columns) of the change.
        resample_every: Rounds of a link.
        fresh: Share of the rows that are drawn anew, in [0, 1].
        pairs: Draw every even link whole.
        kept_scale: c, the length of kept rows in (0, 1], where fresh ones have length 1; ``auto``:
            (r / d)^(1/4) for rows of d numbers.
    """

    traits = Traits(exact=True, linear=True, merges=True, ranks=True, varies=True)

    basis: str = "singular"
    resample_every: int = 2
    fresh: float = 0.25
    pairs: bool = False
    kept_scale: float | str = "auto"

    @override
    def factors(self, layer: Layer, now: Round) -> Factors:
        drawn, trained = sides(layer.link)
        sketch = now.sketch(layer, drawn, BASES[self.basis], index=layer.link, normalise="rows")
        if drawn not in layer.carried:
            return {trained: layer.trained(trained), drawn: sketch}
        kept = as_rows(layer.carried[drawn].to(torch.float64), drawn)
        if self.basis == "coordinate":
            clocks = generator(now.draw.seed, "kept", layer.name, layer.link)
            uniform = torch.from_numpy(clocks.random(kept.shape[1]))
            kept = chosen(kept[0], self.kept(layer.rank, layer.link), uniform)
        rows = completed(kept, as_rows(sketch.draw(), drawn))
        rows[: len(kept)] *= self.length(*rows.shape)
        frozen = as_rows(rows, drawn).to(layer.dtype)
        return {trained: layer.trained(trained), drawn: frozen}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        trained = trained_side(replies.adapter)
        if not layer.ends:
            return LayerUpdate(carried=layer.carried | {trained: replies.mean(trained)})
        # Of what is merged to the bit, as a client that holds the link could.
        means = replies.means() | {trained: replies.mean(trained).to(layer.dtype)}
        change, kept = (means["B"], means["A"]), self.kept(layer.rank, layer.link + 1)
        carried = {trained: self.directions(change, trained, kept)} if kept else {}
        return LayerUpdate(merged=change, carried=carried)  # W <- W + s B A

    def kept(self, rank: int, link: int) -> int:
        """Count the rows of a link that come from the one before it, k."""
        whole = link == 0 or (self.pairs and link % 2 == 0)
        return 0 if whole else rank - ceil(self.fresh * rank)

    def length(self, rank: int, dim: int) -> float:
        """Compute c, the length of kept rows of ``dim`` numbers."""
        return (rank / dim) ** 0.25 if self.kept_scale == "auto" else float(self.kept_scale)

    def directions(self, change: tuple[Value, Value], side: str, kept: int) -> torch.Tensor:
        """Compute what the next link keeps of a change B A: as B [m, k], or as A [k, n].

        For ``coordinate`` the squared lengths of its rows, or columns: [m, 1], or [1, n].
        """
        B, A = matrices(Term(change, 1.0))
        if self.basis == "singular":
            u, _, vt = truncated_product(B, A, kept)
            return u if side == "B" else vt
        squares = (B @ (A @ A.mT) * B).sum(dim=1) if side == "B" else (B.mT @ B @ A * A).sum(dim=0)
        return as_rows(squares[None], side)

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        after = super().close_round(state, sent, got)
        energy = torch.zeros(2, dtype=torch.float64)  # in the basis, and in all
        for name, term in (after.link or Link()).terms.items():
            rank = self.rank_of(state.plan, name)
            if sent.ranks is not None and int(sent.ranks.min()) < rank:
                return after  # fresh components are the last, which few clients have trained
            kept = self.kept(rank, state.memo.sketch)
            energy += energies(term, trained_side(sent.adapters[name]), kept)
        share = float(energy[0] / energy[1])
        # Within a link it is 0 / 0, and without fresh rows nothing is known of what lies outside.
        report = {"energy_seen": share} if share > 0 else {}
        return replace(after, report=after.report | report)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        up, down = super().floats(plan, round_)
        link = (round_ - 1) // self.resample_every
        side = "BA".index(sides(link)[0])
        for name, view in plan.targets.items():
            rank = self.rank_of(plan, name)
            down += rank * view.shape[side] if self.kept(rank, link) else 0
        return up, down

    @property
    @override
    def link_rounds(self) -> int:
        return self.resample_every

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        if self.basis not in BASES:
            raise unknown("method.basis", self.basis, BASES)
        if not self.resample_every or self.resample_every < 1:
            raise ConfigError(
                f"method.resample_every is {self.resample_every}; 1 or more is wanted, since a "
                "basis is taken from links that have ended"
            )
        if not 0 <= self.fresh <= 1:
            raise ConfigError(f"method.fresh is {self.fresh}; a share in [0, 1] is wanted")
        if self.kept_scale != "auto" and not (
            isinstance(self.kept_scale, float | int) and 0 < self.kept_scale <= 1
        ):
            raise ConfigError(
                f"method.kept_scale is {self.kept_scale!r}; auto, or a number in (0, 1], is wanted"
            )


def sides(link: int) -> tuple[str, str]:
    """Return the labels of the frozen and of the trained factor of a link: right, then left."""
    return ("A", "B") if link % 2 == 0 else ("B", "A")


def trained_side(adapter: Adapter) -> str:
    """Return the label of the trained factor of what was asked."""
    return next(k for k, factor in adapter.factors.items() if isinstance(factor, Trained))


def as_rows(factor: torch.Tensor, label: str) -> torch.Tensor:
    """Turn B so that its components are rows, as those of A are; and back."""
    return factor.mT if label == "B" else factor


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

    Over the draw, whole is unbiased. Of several steps, or adaptive ones, these are energies of the
    way that clients went.

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
