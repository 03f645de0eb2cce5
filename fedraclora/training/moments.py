"""Moments of a client's optimiser that live on from round to round, at the client.

A link may be several rounds long, so that it can be measured, or stopped, on its way. Its local
steps are those of one long round if the moments (and Adam's count of steps) live on:

    local.moments = round   they begin at zero in every round
    local.moments = link    they live as long as what is trained: a new link begins with new ones
    local.moments = run     they never end; after a merge they speak of a sketch that is gone
    local.moments = rows    they begin anew in every round, but second moments of rows go on, at the
                            server (`fedraclora.training.optimiser`)

``link`` is a chain whose links have an optimiser of their own (COLA). ``run`` is what the public
code of RAC-LoRA does: its optimiser does not know of the merge. ``local.moments_kept`` lets a
share of the moments outlive a link: for each tensor the entries whose first moment is largest, the
others are set to zero. That is the partial reset of ReLoRA (Lialin et al., ICLR 2024, arXiv
2307.05695), which keeps 1 % or less; like its public code it leaves the count of steps as it is.
That code prunes the second moment by its own magnitude. Here both keep the same entries: where a
first moment stays and its second is gone, Adam divides by eps, and A of a new link, whose gradient
is zero while B is, moves by 1e8 times the step size unless the warm-up begins at a rate of zero.

Where gradients are projected (GaLore), what they are projected on is a part of the moments.

Moments do not travel: each client has its own, also of what is averaged. They are not exact under
averaging, and one that is seldom asked has old ones; with one client there is no difference.
Shuffles and dropout masks are keyed by the round, so K rounds of one epoch see other batches than
one round of K epochs; in the stored order (``local.shuffle=false``) they see the same ones.

GaLore: whole weights take the steps of an optimiser that sees their projected gradients alone.

    every ``gap`` steps of a client, of its gradient G [m, n]:
        U S V^T = G;   P = the first r columns of U if m <= n, else of V
    R = P^T G (G P if m > n);   D = the step of SGD or AdamW for R, with the moments of R
    W <- W + scale P D (W + scale D P^T if m > n)

So moments have r rows (columns) in the place of the m (n) of the smaller side. What is trained and
not projected (heads, biases) takes plain steps of the same optimiser.

P belongs to the moments: it lives as long as they do, and the steps
of a gap are counted where Adam counts its own. When P is taken anew the moments stay as they are,
in coordinates that then mean other directions, as in the authors' code.

- SGD's L2 term is a part of the gradient, and projected with it; AdamW's decay acts on the weight.
- Columns of P have the sign with which their largest entry is positive: where moments outlive a P,
  the sign matters, and an SVD leaves it open.
- Columns for singular values that are zero but for rounding are zero: which directions they would
  name is the library's choice. Nothing is trained along them until the next P.

References:
    Zhao et al., *GaLore: memory-efficient LLM training by gradient low-rank projection*, ICML 2024,
    arXiv 2403.03507, and its code (``galore_torch``: projector ``std``, AdamW). There Adam's eps is
    added before the correction of the second moment, and decay comes after the step; here both are
    as in ``torch.optim``. A square matrix is projected from the right there; here from the left, as
    in the paper's algorithm, whose P stands there for m <= n. It has no SGD.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.lowrank.algebra import fix_signs
from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.recipes import RECIPES, as_matrices
from fedraclora.training.localconfig import LocalConfig, moment_kinds
from fedraclora.training.optimiser import CohortOptimiser
from fedraclora.tree import Tree


@dataclass(frozen=True)
class Projection:
    """How the gradients of one weight are projected.

    Attributes:
        m, n: Outputs and inputs of the weight as a matrix.
        rank: r, at most the smaller of them.
        turned: Whether it is stored (in, out).
    """

    m: int
    n: int
    rank: int
    turned: bool

    @property
    def left(self) -> bool:
        """Return whether P stands on the left: on the smaller side."""
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
        """Project gradients [K, ...] as they are stored on P [K, *basis]; gives [K, *coordinates].

        Written so that no copy of a gradient is made.
        """
        G = as_matrices(gradient, turned=self.turned)
        return P.mT @ G if self.left else G @ P

    def add(self, value: torch.Tensor, P: torch.Tensor, D: torch.Tensor, scale: float) -> None:
        """Add ``scale P D`` (or ``scale D P^T``) to weights [K, ...] as they are stored, in place.

        Written so that no second matrix of their size is made.
        """
        left, right = (P, D) if self.left else (D, P.mT)
        if self.turned:
            value.baddbmm_(right.mT, left.mT, alpha=scale)
        else:
            value.view(*value.shape[:2], -1).baddbmm_(left, right, alpha=scale)


def projections(downlink: Downlink) -> dict[str, Projection]:
    """Read which weights a round projects, and how; none but under the recipe ``galore``."""
    if not RECIPES[downlink.recipe].projects:
        return {}
    found = {}
    for name, slot in downlink.dense.items():
        if f"rank/{name}" in downlink.arguments:
            turned = f"turned/{name}" in downlink.arguments
            m, n = as_matrices(torch.empty(1, *slot.shape, device="meta"), turned=turned).shape[1:]
            found[name] = Projection(m, n, int(downlink.arguments[f"rank/{name}"]), turned)
    return found


def leading_vectors(G: torch.Tensor, projection: Projection) -> torch.Tensor:
    """Compute P of one gradient [m, n]: its leading singular vectors on the smaller side.

    Returns:
        [min(m, n), r]: orthonormal columns, signed by their largest entry; zero where the gradient
        has no more directions.
    """
    u, s, vt = torch.linalg.svd(G, full_matrices=False)
    P = (u if projection.left else vt.mT)[:, : projection.rank]
    least = 10 * max(G.shape) * torch.finfo(G.dtype).eps * s[0]
    signed, _ = fix_signs(P, P.mT)
    return signed.mul_(s[: projection.rank] > least)


class GaLore(CohortOptimiser):
    """SGD or AdamW on tensors [K, ...], some of whose gradients are projected.

    Args:
        config: Local settings.
        values: The tensors that are trained, [K, ...]; updated in place by `step`.
        rates: Step size of each.
        stored: Moments to begin with and their projections, by the names of
            `fedraclora.training.moments`; none: at zero.
        downlink: Of the round: what is projected, and ``gap`` and ``scale`` among its arguments.
    """

    def __init__(
        self,
        config: LocalConfig,
        values: Tree,
        rates: dict[str, float],
        stored: Tree,
        downlink: Downlink,
    ) -> None:
        super().__init__(config, values, rates, stored)
        self.gap = int(downlink.arguments["gap"])
        self.scale = float(downlink.arguments["scale"])
        self.projections: Mapping[str, Projection] = projections(downlink)
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
        if config.weight_decay and config.optimiser == "sgd":
            gradient = gradient.add(value, alpha=config.weight_decay)
        elif config.weight_decay:
            value.mul_(1 - self.rates[name] * config.weight_decay)
        P = self._basis(name, gradient)
        R = projection.take(P, gradient)
        if name not in self.first:
            for moments, _ in zip((self.first, self.second), moment_kinds(config), strict=False):
                moments[name] = R.new_zeros(len(self.values[name]), *R.shape[1:])
        D = torch.zeros_like(R)  # from here the optimiser takes its step
        super()._take(name, D, R)
        projection.add(value, P, D, self.scale)

    def _basis(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return P of the clients that still train, [active, *basis], taken anew where it is due.

        One client after another: an SVD then takes its room once, and has the same bits in a chunk
        of any size.
        """
        active, projection = len(gradient), self.projections[name]
        if name not in self.bases:
            K = len(self.values[name])
            self.bases[name] = gradient.new_zeros(K, *projection.basis)
        for k in self.due:
            G = as_matrices(gradient[k : k + 1], turned=projection.turned)[0]
            self.bases[name][k] = leading_vectors(G, projection)
        return self.bases[name][:active]


def moment_shapes(local: LocalConfig, downlink: Downlink) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what an optimiser holds for one client.

    Args:
        local: Settings.
        downlink: Says what is trained.

    Returns:
        By ``first/<name>`` and so on: as what is trained; of a weight whose gradients are projected
        (`fedraclora.training.moments`) as these, with ``basis/<name>``, of what they are projected
        on.
    """
    projected = projections(downlink)
    found: dict[str, tuple[int, ...]] = {}
    for kind in moment_kinds(local):
        for name, slot in downlink.trained().items():
            own = projected.get(name)
            found[f"{kind}/{name}"] = slot.shape if own is None else own.coordinates
    return found | {f"basis/{name}": own.basis for name, own in projected.items()}


def blank_moments(local: LocalConfig, downlink: Downlink, dtype: torch.dtype) -> Tree:
    """Build the moments of a client that has not trained yet, to be stored by name.

    Args:
        local: Settings; nothing stays at clients under ``moments: round`` and ``rows``.
        downlink: Says what is trained.
        dtype: Of the base weights.

    Returns:
        ``moments/first/<name>`` and so on in the shapes of `moment_shapes`, ``moments/steps``
        (steps that they have seen) and ``moments/link`` (the link that they belong to), without
        a client axis.
    """
    if local.moments in {"round", "rows"}:
        return {}
    shapes = moment_shapes(local, downlink)
    found = {f"moments/{name}": torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    return found | {key: torch.zeros((), dtype=dtype) for key in ("moments/steps", "moments/link")}


def begin_moments(stored: Tree, local: LocalConfig, link: int) -> Tree:
    """Compute the moments with which clients begin a round: reset where their link has ended.

    Args:
        stored: What they kept, [K, ...] by the names of `blank_moments`. Not modified.
        local: Settings.
        link: Number of the link that the round belongs to.

    Returns:
        A new tree.
    """
    if not stored:
        return {}
    ended = stored["moments/link"] != link
    out = {**stored, "moments/link": torch.full_like(stored["moments/link"], link)}
    if local.moments == "run" or not ended.any():
        return out
    for name, value in stored.items():
        if name == "moments/link":
            continue
        if name == "moments/steps":
            left = value if local.moments_kept else torch.zeros_like(value)
        else:
            first = stored[name.replace("moments/second/", "moments/first/")]
            left = value.where(mark_largest(first, local.moments_kept), 0)
        out[name] = torch.where(ended.reshape(-1, *[1] * (value.dim() - 1)), left, value)
    return out


def mark_largest(values: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the entries of largest magnitude of each client.

    Args:
        values: [K, ...].
        share: Of each client's entries that is marked, rounded to a number of entries.

    Returns:
        Booleans [K, ...].

    Example:
        >>> mark_largest(torch.tensor([[3.0, -4.0, 1.0, 0.0]]), 0.5)
        tensor([[ True,  True, False, False]])
    """
    rows = values.reshape(len(values), -1)
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    first = order[:, : round(share * rows.shape[1])]
    return (
        torch.zeros_like(rows, dtype=torch.bool).scatter(1, first, value=True).reshape(values.shape)
    )
