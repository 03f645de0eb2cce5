"""GaLore at the clients, full weights averaged: moments are kept in a subspace of the gradients.

    client k: every ``gap`` local steps P_k = the r leading singular vectors of its gradient G, on
    the smaller side;  R = P_k^T G (m <= n), or G P_k (m > n);  D = the optimizer's step for R
    W_k <- W_k + scale P_k D,  or W_k + scale D P_k^T;   W <- sum_k p_k W_k

- Uplink: m n numbers per matrix.
- Downlink: the updates that the client missed, at most m n numbers per matrix.
- Aggregation: exact and linear, as FedAvg's.
- Client: each moment has r max(m, n) numbers per matrix (m n in FedAvg), and P_k has r min(m, n).
  Moments, step count and P_k start anew in each round, unless ``local.optimizer_state`` is
  ``merge`` or ``run`` (which are the same here, since this method never merges). Then a client that
  is sampled again continues with its own, and ``gap`` counts its steps over all rounds. Plain SGD
  has no moments, so P_k is computed anew in each round.
- Server: one mean, K m n operations.
- Source: Mahla, Jadhav and Ramakrishnan, *Why gradient subspace? Identifying and mitigating LoRA's
  bottlenecks in federated fine-tuning of large language models*, arXiv 2410.23111; GaLore: Zhao et
  al., ICML 2024, arXiv 2403.03507.
- Held to: jiaweizzhao/GaLore at 2cc66f8: the client's optimizer, 8 steps.
- Departures: from GaLore's code (``galore_torch``: projector ``std``, AdamW). The code adds Adam's
  eps before it corrects the second moment, and decays weights after the step; here both are as in
  ``torch.optim``. The code projects a square matrix from the right; here from the left, as in the
  paper's algorithm. The code has no SGD. Here directions without gradient are left out, and P's
  signs are fixed. ``scale`` is 1; GaLore pretrains with 0.25. The code of the federated paper
  (navyanshmahla/fedftg at 8546ceb) makes an optimizer once, so that moments outlive rounds: that is
  ``local.optimizer_state=run``. It hands GaLore no rank and so no interval; those here are GaLore's
  own defaults.

Moments have r rows (columns) instead of the m (n) of the smaller side. Tensors that are trained but
not projected (heads, biases) take plain steps of the same optimizer. P is stored with the moments,
and the steps of a gap are counted with Adam's step count. When P is computed anew the moments keep
their values, although their coordinates then mean other directions; the authors' code does so, too.

- SGD's L2 term is part of the gradient and is projected with it; AdamW's decay acts on the weight.
- Columns of P have the sign with which their largest entry is positive. An SVD leaves signs open,
  and they matter where moments outlive a P.
- Columns of P are zero where the singular value is zero up to rounding, since their directions are
  the library's choice. Nothing is trained along them until the next P.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from typing_extensions import override

from fedraclora.limits import Count, Limited, Positive
from fedraclora.lowrank.algebra import fix_signs
from fedraclora.protocol.method import Cohort, Draw, Plan, RoundInstructions, State
from fedraclora.protocol.plan import Rank, rank_notes, resolve_rank
from fedraclora.protocol.program import ClientChunk, ClientProgram, Rates
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.fedavg import FedAvg
from fedraclora.strategies.shared.common import as_matrices, turned
from fedraclora.training.localconfig import LocalConfig, moment_kinds
from fedraclora.training.optimizer import CohortOptimizer
from fedraclora.tree import Tree
from fedraclora.wire.fields import whole_number

COLUMNS = 32  # of the first sketch of a gradient
# Roundings of its norm that may be left of it. The QR decomposition of some processors leaves 40 of
# a matrix of equal rows, and a sketch of as many columns as the rank has small singular values.
SLACK = 64


@dataclass(frozen=True)
class Projection:
    """Hold how the gradients of one weight are projected.

    Attributes:
        m, n: Outputs and inputs of the weight as a matrix.
        rank: r, at most the smaller of them.
        turned: Whether the weight is stored (in, out).
    """

    m: int
    n: int
    rank: int
    turned: bool

    @property
    def left(self) -> bool:
        """Return whether P multiplies from the left, the smaller side."""
        return self.m <= self.n

    @property
    def basis(self) -> tuple[int, int]:
        """Return the shape of P."""
        return min(self.m, self.n), self.rank

    @property
    def coordinates(self) -> tuple[int, int]:
        """Return the shape of a projected gradient, and of its moments."""
        return (self.rank, self.n) if self.left else (self.m, self.rank)

    def take(self, P: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Project gradients [K, ...] on P [K, *basis]; gives [K, *coordinates].

        Gradients have their stored shape. It makes no copy of a gradient.
        """
        G = as_matrices(gradient, turned=self.turned)
        return P.mT @ G if self.left else G @ P

    def add(self, value: torch.Tensor, P: torch.Tensor, D: torch.Tensor, scale: float) -> None:
        """Add ``scale P D`` (or ``scale D P^T``) to weights [K, ...], in place.

        Weights have their stored shape. It makes no second matrix of their size.
        """
        left, right = (P, D) if self.left else (D, P.mT)
        if self.turned:
            value.baddbmm_(right.mT, left.mT, alpha=scale)
        else:
            value.view(*value.shape[:2], -1).baddbmm_(left, right, alpha=scale)


def low_rank_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the SVD of a matrix; the lower its rank, the less it costs.

    A random sketch G Omega of few columns spans the range of a matrix G of that rank. Q is its
    orthonormal basis. If G - Q Q^T G is not above rounding, the SVD of the small matrix Q^T G gives
    that of G; else the sketch gets twice the columns, up to a quarter of the smaller side. Beyond
    that, and for small matrices, the SVD of G is computed.

    Args:
        matrix: G [m, n].

    Returns:
        ``U`` [m, k], ``S`` [k] and ``Vt`` [k, n]; k is at least the rank of G up to rounding.

    References:
        Halko, Martinsson and Tropp, *Finding structure with randomness*, SIAM Review 53(2), 2011,
        arXiv 0909.4061, algorithm 4.2 (their error is estimated, here it is computed).

    Example:
        >>> u, s, vt = low_rank_svd(torch.ones(200, 300))
        >>> len(s), round(float(s[0] ** 2))
        (32, 60000)
    """
    if matrix.shape[0] > matrix.shape[1]:  # fewer rows to keep
        v, s, ut = low_rank_svd(matrix.mT)
        return ut.mT, s, v.mT
    columns, rounding = COLUMNS, torch.linalg.vector_norm(matrix) * torch.finfo(matrix.dtype).eps
    while 4 * columns <= len(matrix):
        q, _ = torch.linalg.qr(matrix @ _sketch(matrix.shape[1], columns).to(matrix))
        inside = q.mT @ matrix
        if torch.linalg.vector_norm(matrix - q @ inside) <= SLACK * rounding:
            u, s, vt = torch.linalg.svd(inside, full_matrices=False)
            return q @ u, s, vt
        columns *= 2
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


@lru_cache(maxsize=8)
def _sketch(rows: int, columns: int) -> torch.Tensor:
    return torch_normal(generator(0, "range", rows), rows, columns)


def leading_vectors(G: torch.Tensor, projection: Projection) -> torch.Tensor:
    """Compute P of one gradient [m, n]: its leading singular vectors on the smaller side.

    Returns:
        [min(m, n), r]: orthonormal columns, signed by their largest entry; zero where the gradient
        has no more directions.
    """
    u, s, vt = low_rank_svd(G)  # its rank is at most the samples, or tokens, of a batch
    P = (u if projection.left else vt.mT)[:, : projection.rank]
    least = 10 * max(G.shape) * torch.finfo(G.dtype).eps * s[0]
    signed, _ = fix_signs(P, P.mT)
    return signed.mul_(s[: projection.rank] > least)


class GaLore(CohortOptimizer):
    """Take steps of SGD or AdamW on tensors [K, ...], with projected gradients for some of them.

    Args:
        config: Local settings.
        values: The trained tensors, [K, ...]; updated in place by `step`.
        rates: Step size of each.
        stored: Moments and projections to start with, by the names of
            `fedraclora.training.moments`; without them moments start at zero.
        program: Its `gap` and `scale`.
        projections: Of the weights whose gradients are projected, by name.
    """

    def __init__(
        self,
        config: LocalConfig,
        values: Tree,
        rates: dict[str, float],
        stored: Tree,
        program: ProjectGradients,
        projections: Mapping[str, Projection],
    ) -> None:
        super().__init__(config, values, rates, stored)
        self.gap, self.scale = program.gap, program.scale
        self.projections = projections
        self.bases = self._of_kind("basis")
        self.due: list[int] = []  # places of the clients that take their P anew in this step

    @override
    def step(self, gradients: Tree) -> None:
        active = len(next(iter(gradients.values())))
        before = torch.zeros(active) if self.before is None else self.before[:active]
        # Counted before this step is: the first of all is due.
        self.due = ((before + self.count) % self.gap == 0).nonzero().flatten().tolist()
        super().step(gradients)

    @override
    def _take(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        if (projection := self.projections.get(name)) is None:
            super()._take(name, value, gradient)
            return
        config = self.config
        if config.weight_decay and config.optimizer == "sgd":
            gradient = gradient.add(value, alpha=config.weight_decay)
        elif config.weight_decay:
            value.mul_(1 - self.rates[name] * config.weight_decay)
        P = self._basis(name, gradient)
        R = projection.take(P, gradient)
        if name not in self.first:
            for moments, _ in zip((self.first, self.second), moment_kinds(config), strict=False):
                moments[name] = R.new_zeros(len(self.values[name]), *R.shape[1:])
        D = torch.zeros_like(R)  # from here the optimizer takes its step
        super()._take(name, D, R)
        projection.add(value, P, D, self.scale)

    def _basis(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return P of the clients that still train, [active, *basis], computed anew where due.

        It treats one client after another: an SVD then needs its memory once, and has the same bits
        in a chunk of any size.
        """
        active, projection = len(gradient), self.projections[name]
        if name not in self.bases:
            K = len(self.values[name])
            self.bases[name] = gradient.new_zeros(K, *projection.basis)
        for k in self.due:
            G = as_matrices(gradient[k : k + 1], turned=projection.turned)[0]
            self.bases[name][k] = leading_vectors(G, projection)
        return self.bases[name][:active]


@dataclass(frozen=True)
class ProjectGradients(ClientProgram, group="method"):
    """Give the optimizer of whole weights projected gradients only.

    Attributes:
        gap: Local steps for which a projection is used.
        scale: Factor of the step that is projected back.
        ranks: r of each weight whose gradients are projected.
        turned: Those of them that are stored (in, out).
    """

    name = "galore"

    gap: Count
    scale: Positive
    ranks: dict[str, int]
    turned: tuple[str, ...] = ()

    @override
    def check(self, downlink: RoundInstructions) -> None:
        for name in self.ranks:
            whole_number(self.ranks[name], f"the rank of {name}", 1)

    def projections(self, downlink: RoundInstructions) -> dict[str, Projection]:
        """Read how the gradients of each weight are projected."""
        found = {}
        for name, slot in downlink.dense.items():
            if name in self.ranks:
                turned = name in self.turned
                like = torch.empty(1, *slot.shape, device="meta")
                m, n = as_matrices(like, turned=turned).shape[1:]
                found[name] = Projection(m, n, self.ranks[name], turned)
        return found

    @override
    def optimizer(self, chunk: ClientChunk, rates: Rates) -> GaLore:
        projections = self.projections(chunk.downlink)
        return GaLore(chunk.local, chunk.values, rates, chunk.moments, self, projections)

    @override
    def moment_shapes(
        self, downlink: RoundInstructions, kinds: tuple[str, ...]
    ) -> dict[str, tuple[int, ...]]:
        projected = self.projections(downlink)
        own = {f"{k}/{n}": each.coordinates for n, each in projected.items() for k in kinds}
        bases = {f"basis/{name}": each.basis for name, each in projected.items()}
        return super().moment_shapes(downlink, kinds) | own | bases


@dataclass(frozen=True)
class GaloreAverage(Limited, FedAvg, group="method"):
    """GaLore at the clients, full weights averaged.

    Attributes:
        rank: r; a fraction (0, 1] of the smaller side if written with a dot. At the smaller side or
            above, gradients are only rotated.
        gap: Local steps between new projections, counted as long as a client keeps its moments.
        scale: Factor of the projected step (the paper's alpha); weight decay is not scaled.
    """

    rank: int | float = 8
    gap: Count = 200
    scale: Positive = 1.0

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        resolve_rank(self.rank, 1, "any layer", cap=True)

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        notes = rank_notes(self.layer_rank(plan, name) for name in plan.targets)
        return State(base, plan, notes=notes)

    def layer_rank(self, plan: Plan, name: str) -> Rank:
        """Compute the rank of one layer, and a note if it differs from the configured one."""
        return resolve_rank(self.rank, min(plan.targets[name].shape), name, cap=True)

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        plan = state.plan
        ranks = {name: self.layer_rank(plan, name).value for name in plan.targets}
        program = ProjectGradients(self.gap, self.scale, ranks, turned(plan))
        return replace(super().open_round(state, round_, cohort, draw), program=program)
