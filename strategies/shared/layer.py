"""Give methods a view of one adapted matrix: its factors, its replies and its update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

import numpy as np
import torch

from fedraclora.errors import ConfigError
from fedraclora.lowrank.algebra import Product, stack_products
from fedraclora.protocol.factor import LABELS, Factor, FactorLike, to_train
from fedraclora.protocol.method import Adapter, Draw, RoundInstructions, State
from fedraclora.protocol.rank_budgets import within
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.shared.common import opening, server_step
from fedraclora.tree import Tree

Factors = dict[str, FactorLike]  # factors of a layer, by label


def known(label: str, labels: Sequence[str] = LABELS) -> str:
    """Return the label of a factor.

    Raises:
        ConfigError: If no factor has it.
    """
    if label in labels:
        return label
    raise ConfigError(
        f"the method names the factor {label!r}, which does not exist. Use "
        f"{', '.join(labels)}, the factors of a product in this order"
    )


@dataclass(frozen=True)
class Layer:
    """Hold one adapted matrix W with its factors.

    Attributes:
        name: The name of its weight.
        shape: (m, n): outputs and inputs.
        rank: r.
        scale: s.
        carried: Factors continued from the last round, by label, in W's precision.
        link: Number of links that have ended; a link may end without a merge.
        ends: Whether this round is the last of its link.
        dtype: Precision of W.
        past: The factor trained before the last merge, if kept (`LayerUpdate.keep`), as replicas
            hold it.
        frozen: Frozen factors since the last merge as they were sent after quantization, by label:
            they replace those that the method computes.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scale: float
    carried: Tree
    link: int
    ends: bool = False
    dtype: torch.dtype = torch.float32
    past: torch.Tensor | None = None
    frozen: Tree = field(default_factory=dict)

    @property
    def m(self) -> int:
        """Return the outputs: the rows of W and of B."""
        return self.shape[0]

    @property
    def n(self) -> int:
        """Return the inputs: the columns of W and of A."""
        return self.shape[1]

    def trained(
        self,
        label: str,
        start: FactorLike | None = None,
        *,
        rank: int | None = None,
        upload: bool = True,
    ) -> Factor:
        """Describe a factor that clients train.

        Args:
            label: ``B`` [m, r], ``A`` [r, n] or ``R`` [r, r].
            start: Its start if it is not continued; None: zero.
            rank: r, if it is not that of the layer.
            upload: False for a factor that stays at the client.
        """
        r = self.rank if rank is None else rank
        shape = {"B": (self.m, r), "R": (r, r), "A": (r, self.n)}[known(label)]
        return to_train(shape, self.carried.get(label, start), upload=upload)


@dataclass(frozen=True)
class RoundContext:
    """Hold the current round, and draw its random factors.

    Attributes:
        number: From 1.
        draw: The run's randomness.
    """

    number: int
    draw: Draw

    def generator(self, purpose: str, *keys: str | int) -> np.random.Generator:
        """Return a generator of the run's seed tree, for draws by the server only."""
        return generator(self.draw.seed, purpose, *keys)

    def sketch(
        self,
        layer: Layer,
        label: str,
        kind: str,
        *,
        index: int = 0,
        rank: int | None = None,
        normalize: str = "none",
        blocks: str = "independent",
        density: float = 0.1,
        seed: int | None = None,
    ) -> SketchSpec:
        """Draw a factor of a layer: A [r, n], or B [m, r].

        Args:
            layer: The layer.
            label: ``A`` or ``B``.
            kind: A key of `fedraclora.sketch.SKETCHES`.
            index: Number of the drawing; different numbers give independent drawings.
            rank: r, if it is not that of the layer.
            normalize: How rows are scaled (`fedraclora.sketch`).
            blocks: ``independent``, or ``cover`` (row blocks of one basis).
            density: Share of non-zero entries, only for ``sparse_sign``.
            seed: None: the layer's own.
        """
        return SketchSpec(
            kind=kind,
            side="right" if known(label, "BA") == "A" else "left",
            rank=layer.rank if rank is None else rank,
            dim=layer.n if label == "A" else layer.m,
            seed=self.draw.sketch_seed(layer.name) if seed is None else seed,
            index=index,
            blocks=blocks,
            normalize=normalize,
            density=density,
        )


@dataclass(frozen=True)
class LayerUpdate:
    """Hold the result of a round for one layer. Products are without the scale s.

    Attributes:
        carried: Factors to continue, by label; a drawing only if it is in `LayerMethod.keeps`.
        merged: Factors whose product is merged into W, times s; None: none.
        aggregate: The product that is compared with the mean of the clients' products in the error
            of the round; None: continued and merged factors together.
        keep: Label, ``B`` or ``A``, of the merged factor from which the next frozen one is computed
            (`fedraclora.protocol.factor`): a matrix, no drawing; None: none.
    """

    carried: Mapping[str, FactorLike] = field(default_factory=dict)
    merged: tuple[FactorLike, ...] | None = None
    aggregate: Product | None = None
    keep: str | None = None


@dataclass(frozen=True)
class RoundReplies:
    """Hold the replies of a round, for all layers.

    Attributes:
        state: The state before the round.
        sent: The instructions.
        uplinks: The updates.
    """

    state: State
    sent: RoundInstructions
    uplinks: Uplinks

    @cached_property
    def mean(self) -> Tree:
        """Return the weighted means of all updates, float64, by name."""
        return self.uplinks.mean()

    @cached_property
    def stack(self) -> Tree:
        """Return all updates, [K, ...], by name."""
        return self.uplinks.stack()


@dataclass(frozen=True)
class Replies:
    """Hold the replies of a round's clients for one layer, in float64.

    Attributes:
        all: Their replies for all layers.
        name: The name of the layer's weight.
    """

    all: RoundReplies
    name: str

    @property
    def adapter(self) -> Adapter:
        """Return the instructions for the layer."""
        return self.all.sent.adapters[self.name]

    def __getitem__(self, label: str) -> Factor:
        """Return a frozen factor as it was sent."""
        asked = self._factor(label)
        if asked.trained:
            raise ConfigError(
                f"the factor {label} was trained by each client, so there is no frozen one. "
                f"Use replies.mean({label!r}) or replies.stack({label!r}), if clients sent it"
            )
        return asked

    def _factor(self, label: str) -> Factor:
        """Return the instructions for a factor."""
        return self.adapter.factors[known(label, [*self.adapter.factors])]

    def _trained(self, label: str) -> Factor:
        """Return the instructions for a factor that clients trained and sent."""
        asked = self._factor(label)
        if not asked.trained:
            raise ConfigError(
                f"the factor {label} was frozen, so clients did not send it. Use replies[{label!r}]"
            )
        if not asked.upload:
            raise ConfigError(f"the factor {label} stays at each client, so no reply contains it")
        return asked

    def mean(self, label: str, step: float = 1.0) -> torch.Tensor:
        """Compute the weighted mean of a trained factor, ``sum_k p_k F_k``.

        Args:
            label: The label of the factor.
            step: The server's step size, from the factor's start; 1: the mean.
        """
        asked = self._trained(label)
        start = asked.opening() if step != 1.0 else None
        return server_step(start, self.all.mean[f"{self.name}/{label}"], step)

    def means(self, step: float = 1.0, *, drawn: bool = True) -> dict[str, FactorLike]:
        """Return factors by label in the order of their product: means, and frozen ones as sent.

        Factors that stay at the clients are left out.

        Args:
            step: As in `mean`.
            drawn: False: leave out frozen ones that are drawn, which need not be continued.
        """
        return {
            label: self.mean(label, step) if asked.trained else asked
            for label, asked in self.adapter.factors.items()
            if asked.upload and (drawn or asked.trained or asked.numbers is not None)
        }

    def stack(self, label: str) -> torch.Tensor:
        """Stack each client's own factor, [K, ...].

        Raises:
            ShapeError: If only the sum is known.
        """
        self._trained(label)
        return self.all.stack[f"{self.name}/{label}"].to(torch.float64)

    @property
    def B(self) -> torch.Tensor:  # noqa: N802 (the field's own letter)
        """Return each client's B, [K, m, r]."""
        return self.stack("B")

    @property
    def A(self) -> torch.Tensor:  # noqa: N802
        """Return each client's A, [K, r, n]."""
        return self.stack("A")

    @property
    def mean_factors(self) -> Product:
        """Compute the means of both factors, each separately."""
        return self.mean("B"), self.mean("A")

    @property
    def residual(self) -> Product | None:
        """Compute the error of separate averages, ``sum_k p_k B_k A_k - B_bar A_bar``.

        Since ``sum_k p_k (B_k - B_bar) = 0`` the last client drops out; None for one client.
        """
        B, A, p = self.B, self.A, self.p
        last = len(p) - 1
        if not last:
            return None
        return stack_products(B[:last] - self.mean("B"), A[:last] - A[last], p[:last])

    @property
    def p(self) -> torch.Tensor:
        """Return aggregation weights with sum 1, [K]."""
        uplinks, stacked = self.all.uplinks, next(iter(self.all.stack.values()))
        return uplinks.weights.to(stacked.device, torch.float64) / uplinks.total

    @property
    def kept(self) -> torch.Tensor:
        """Return a mask of each client's components, bool [K, r]."""
        B, sent, uplinks = self.B, self.all.sent, self.all.uplinks
        if sent.ranks is None:
            return torch.ones(len(B), B.shape[2], dtype=torch.bool, device=B.device)
        ranks = sent.ranks if uplinks.places is None else sent.ranks[uplinks.places]
        return within(ranks, B.shape[2]).to(B.device)

    @property
    def carried(self) -> Product | None:
        """Return both factors before the round, float64; None if the adapter was zero."""
        carried, labels = self.all.state.carried, self.adapter.factors
        held = {label: carried.get(f"{self.name}/{label}") for label in labels}
        return self.product_of({label: t for label, t in held.items() if t is not None})

    @property
    def start(self) -> Product:
        """Return both factors before the round; drawn or zero if none were continued."""
        if (found := self.carried) is not None:
            return found
        B, A = (opening(self.adapter.factors[k], self.B) for k in "BA")
        return B, A

    def product_of(self, values: Mapping[str, FactorLike]) -> Product | None:
        """Multiply factors by label; missing frozen ones are taken as sent.

        None if a trained one is missing, so that the adapter is zero.
        """
        asked = self.adapter.factors
        if any(f.trained and label not in values for label, f in asked.items()):
            return None
        return multiplied([values.get(label, f) for label, f in asked.items()])

    def product(self) -> Product:
        """Write ``sum_k p_k B_k A_k`` as one product.

        If one factor is trained, it is the product of the mean; else it is stacked, without
        components that no client has.
        """
        factors = self.adapter.factors
        trained = [label for label, asked in factors.items() if asked.trained]
        if len(trained) == 1:
            return multiplied(self.means().values())
        each = {label: self.stack(label) for label in trained}
        some = each[trained[0]]
        lefts, *others = (
            each[label] if label in each else float64(self[label], some).expand(len(some), -1, -1)
            for label in factors
        )
        left, right = stack_products(lefts, reduce(torch.matmul, others), self.p)
        if self.all.sent.ranks is None:
            return left, right
        kept = self.kept.reshape(-1)
        return left[:, kept], right[kept]


def multiplied(factors: Iterable[FactorLike]) -> Product:
    """Write a product of two or more factors, also drawn ones, as one of two float64 matrices."""
    found = [Factor.of(given) for given in factors]
    like = next((f.numbers for f in found if f.numbers is not None), torch.empty(0))
    left, *others = (float64(f, like) for f in found)
    return left, reduce(torch.matmul, others)


def float64(given: Factor, like: torch.Tensor) -> torch.Tensor:
    """Return a factor's matrix on the device of a tensor."""
    return given.draw().to(like.device, torch.float64)
