"""One adapted matrix as a method sees it: its factors, its replies and its update."""

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

Factors = dict[str, FactorLike]  # of a layer, by label


def known(label: str, labels: Sequence[str] = LABELS) -> str:
    """Return the label of a factor.

    Raises:
        ConfigError: If no factor has it: nothing would read what it names.
    """
    if label in labels:
        return label
    raise ConfigError(
        f"the method names the factor {label!r}, which does not exist. Use "
        f"{', '.join(labels)}, the factors of a product in this order"
    )


@dataclass(frozen=True)
class Layer:
    """One adapted matrix W, as a method sees it.

    Attributes:
        name: Of its weight.
        shape: (m, n): outputs and inputs.
        rank: r.
        scale: s.
        carried: The factors that live on from the last round, by label, in W's precision.
        link: Number of the link in progress.
        ends: Whether the link ends with this round.
        dtype: Precision of W.
        past: The factor that the last link trained, where that said so (`LayerUpdate.keep`), as
            replicas hold it.
        frozen: Frozen factors of the link in progress as they were sent in fewer bits, by label:
            they take the place of what the method computes.
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
        """Outputs: the rows of W and of B."""
        return self.shape[0]

    @property
    def n(self) -> int:
        """Inputs: the columns of W and of A."""
        return self.shape[1]

    def trained(
        self,
        label: str,
        start: FactorLike | None = None,
        *,
        rank: int | None = None,
        upload: bool = True,
    ) -> Factor:
        """Ask clients to train a factor.

        Args:
            label: ``B`` [m, r], ``A`` [r, n] or ``R`` [r, r].
            start: Where it starts if it is not carried; None: at zero.
            rank: r, if it is not that of the layer.
            upload: False for a factor that stays at the client.
        """
        r = self.rank if rank is None else rank
        shape = {"B": (self.m, r), "R": (r, r), "A": (r, self.n)}[known(label)]
        return to_train(shape, self.carried.get(label, start), upload=upload)


@dataclass(frozen=True)
class RoundContext:
    """The current round, and its random factors.

    Attributes:
        number: From 1.
        draw: The run's randomness.
    """

    number: int
    draw: Draw

    def generator(self, purpose: str, *keys: str | int) -> np.random.Generator:
        """Return a generator of the run's seed tree, for draws that the server alone makes."""
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
            index: Number of the drawing: another one is independent.
            rank: r, if it is not that of the layer.
            normalize: How rows are scaled (`fedraclora.sketch`).
            blocks: ``independent``, or ``cover`` (row blocks of one basis).
            density: Share of non-zero entries, of ``sparse_sign`` alone.
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
    """The result of a round for one layer. Products are without the scale s.

    Attributes:
        carried: Factors that live on, by label; a drawing only if it is of `LayerMethod.keeps`.
        merged: Factors whose product is folded into W, times s; None: nothing is.
        aggregate: What stands for the mean of the clients' products in the error of the round;
            None: what is carried and what is merged, together.
        keep: Label, ``B`` or ``A``, of the merged factor from which the next link takes its frozen
            one (`fedraclora.protocol.factor`): a matrix, no drawing; None: it does not.
    """

    carried: Mapping[str, FactorLike] = field(default_factory=dict)
    merged: tuple[FactorLike, ...] | None = None
    aggregate: Product | None = None
    keep: str | None = None


@dataclass(frozen=True)
class RoundReplies:
    """Replies of a round, for all layers.

    Attributes:
        state: Before the round.
        sent: What was asked.
        got: What came.
    """

    state: State
    sent: RoundInstructions
    got: Uplinks

    @cached_property
    def mean(self) -> Tree:
        """Weighted means of everything that was sent, float64, by name."""
        return self.got.mean()

    @cached_property
    def stack(self) -> Tree:
        """Everything that was sent, [K, ...], by name."""
        return self.got.stack()


@dataclass(frozen=True)
class Replies:
    """Replies of a cohort for one layer, in float64.

    Attributes:
        all: What it sent of all layers.
        name: Of the layer's weight.
    """

    all: RoundReplies
    name: str

    @property
    def adapter(self) -> Adapter:
        """What was asked of the layer."""
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
        """Return what was asked of a factor."""
        return self.adapter.factors[known(label, [*self.adapter.factors])]

    def _trained(self, label: str) -> Factor:
        """Return what was asked of a factor that clients trained and sent."""
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
            label: Of the factor.
            step: The server's, from where the factor started; 1 gives the mean itself.
        """
        asked = self._trained(label)
        start = asked.opening() if step != 1.0 else None
        return server_step(start, self.all.mean[f"{self.name}/{label}"], step)

    def means(self, step: float = 1.0, *, drawn: bool = True) -> dict[str, FactorLike]:
        """Return factors by label in the order of their product: means, and frozen ones as sent.

        Factors that stay at the clients are left out.

        Args:
            step: As in `mean`.
            drawn: False leaves out frozen ones that are no numbers: they need not be carried.
        """
        return {
            label: self.mean(label, step) if asked.trained else asked
            for label, asked in self.adapter.factors.items()
            if asked.upload and (drawn or asked.trained or asked.numbers is not None)
        }

    def stack(self, label: str) -> torch.Tensor:
        """Stack each client's own factor, [K, ...].

        Raises:
            ShapeError: If only the sum came.
        """
        self._trained(label)
        return self.all.stack[f"{self.name}/{label}"].to(torch.float64)

    @property
    def B(self) -> torch.Tensor:  # noqa: N802 (the field's own letter)
        """Each client's B, [K, m, r]."""
        return self.stack("B")

    @property
    def A(self) -> torch.Tensor:  # noqa: N802
        """Each client's A, [K, r, n]."""
        return self.stack("A")

    @property
    def mean_factors(self) -> Product:
        """Compute the means of both factors, each by itself."""
        return self.mean("B"), self.mean("A")

    @property
    def residual(self) -> Product | None:
        """Compute what separate averages miss, ``sum_k p_k B_k A_k - B_bar A_bar``.

        Since ``sum_k p_k (B_k - B_bar) = 0`` the last client drops out; None for one client.
        """
        B, A, p = self.B, self.A, self.p
        last = len(p) - 1
        if not last:
            return None
        return stack_products(B[:last] - self.mean("B"), A[:last] - A[last], p[:last])

    @property
    def p(self) -> torch.Tensor:
        """Aggregation weights with sum 1, [K]."""
        got, came = self.all.got, next(iter(self.all.stack.values()))
        return got.weights.to(came.device, torch.float64) / got.total

    @property
    def kept(self) -> torch.Tensor:
        """Return which components each client has, bool [K, r]."""
        B, sent, got = self.B, self.all.sent, self.all.got
        if sent.ranks is None:
            return torch.ones(len(B), B.shape[2], dtype=torch.bool, device=B.device)
        ranks = sent.ranks if got.places is None else sent.ranks[got.places]
        return within(ranks, B.shape[2]).to(B.device)

    @property
    def carried(self) -> Product | None:
        """Return both factors before the round, float64; None where the adapter was zero."""
        carried, labels = self.all.state.carried, self.adapter.factors
        held = {label: carried.get(f"{self.name}/{label}") for label in labels}
        return self.product_of({label: t for label, t in held.items() if t is not None})

    @property
    def start(self) -> Product:
        """Return both factors before the round, drawn or zero where none were carried."""
        if (found := self.carried) is not None:
            return found
        B, A = (opening(self.adapter.factors[k], self.B) for k in "BA")
        return B, A

    def product_of(self, values: Mapping[str, FactorLike]) -> Product | None:
        """Multiply factors by label; a frozen one that is not among them is as it was sent.

        None where one that is trained is missing: the adapter is zero.
        """
        asked = self.adapter.factors
        if any(f.trained and label not in values for label, f in asked.items()):
            return None
        return multiplied([values.get(label, f) for label, f in asked.items()])

    def product(self) -> Product:
        """Write ``sum_k p_k B_k A_k`` as one product.

        Where one factor is trained it is that of the mean; else it is stacked, without components
        that nobody has.
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
    """Write a product of two factors or more as one of two float64 matrices; drawings are drawn."""
    found = [Factor.of(given) for given in factors]
    like = next((f.numbers for f in found if f.numbers is not None), torch.empty(0))
    left, *others = (float64(f, like) for f in found)
    return left, reduce(torch.matmul, others)


def float64(given: Factor, like: torch.Tensor) -> torch.Tensor:
    """Give the matrix of a factor on the device of a tensor."""
    return given.draw().to(like.device, torch.float64)
