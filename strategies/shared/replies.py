"""What a cohort sent of each adapted matrix, beside what it was sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import cast

import torch

from fedraclora.errors import ConfigError
from fedraclora.lowrank.algebra import Product, stack_products
from fedraclora.protocol.method import Adapter, Downlink, Factor, State, Trained
from fedraclora.protocol.rank_budgets import within
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.shared.common import opening, server_step
from fedraclora.strategies.shared.layer import Value, known
from fedraclora.tree import Tree


@dataclass(frozen=True)
class RoundReplies:
    """What came back in a round, for all layers.

    Attributes:
        state: Before the round.
        sent: What was asked.
        got: What came.
    """

    state: State
    sent: Downlink
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
    """What a cohort sent of one layer, in float64.

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

    def __getitem__(self, label: str) -> Value:
        """Return a frozen factor as it was sent: a tensor, a drawing, or one of the last link."""
        factor = self._factor(label)
        if isinstance(factor, Trained):
            raise ConfigError(
                f"the factor {label} was trained by each client: replies.mean({label!r}) and "
                f"replies.stack({label!r}) have what came of it, if it was sent"
            )
        return factor

    def _factor(self, label: str) -> Factor:
        """Return what was asked of a factor."""
        return self.adapter.factors[known(label, [*self.adapter.factors])]

    def _trained(self, label: str) -> Trained:
        """Return what was asked of a factor that clients trained and sent."""
        factor = self._factor(label)
        if not isinstance(factor, Trained):
            raise ConfigError(
                f"the factor {label} was frozen and did not come back: it is replies[{label!r}]"
            )
        if not factor.upload:
            raise ConfigError(f"the factor {label} stays at each client: no reply has it")
        return factor

    def mean(self, label: str, step: float = 1.0) -> torch.Tensor:
        """Compute the weighted mean of a trained factor, ``sum_k p_k F_k``.

        Args:
            label: Of the factor.
            step: The server's, from where the factor started; 1 gives the mean itself.
        """
        factor = self._trained(label)
        start = factor.opening() if step != 1.0 else None
        return server_step(start, self.all.mean[f"{self.name}/{label}"], step)

    def means(self, step: float = 1.0) -> dict[str, Value]:
        """Return factors by label in the order of their product: means, and frozen ones as sent.

        Factors that stay at the clients are left out.
        """
        return {
            label: self.mean(label, step) if isinstance(factor, Trained) else self[label]
            for label, factor in self.adapter.factors.items()
            if not isinstance(factor, Trained) or factor.upload
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
    def rank(self) -> int:
        """Components of the adapter."""
        return self.B.shape[2]

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
        B, A = (opening(cast(Trained, self.adapter.factors[k]), self.B) for k in "BA")
        return B, A

    def product_of(self, values: Mapping[str, Value]) -> Product | None:
        """Multiply factors by label; a frozen one that is not among them is as it was sent.

        None where one that is trained is missing: the adapter is zero.
        """
        found = []
        for label, factor in self.adapter.factors.items():
            value = values.get(label)
            if value is None and isinstance(factor, Trained):
                return None
            found.append(self[label] if value is None else value)
        return multiplied(found)

    def product(self) -> Product:
        """Write ``sum_k p_k B_k A_k`` as one product.

        Where one factor is trained it is that of the mean; else it is stacked, without components
        that nobody has.
        """
        factors = self.adapter.factors
        trained = [label for label, factor in factors.items() if isinstance(factor, Trained)]
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


def multiplied(factors: Iterable[Value]) -> Product:
    """Write a product of two factors or more as one of two float64 matrices; drawings are drawn."""
    found = list(factors)
    like = next((f for f in found if isinstance(f, torch.Tensor)), torch.empty(0))
    left, *others = (float64(f, like) for f in found)
    return left, reduce(torch.matmul, others)


def float64(factor: Value, like: torch.Tensor) -> torch.Tensor:
    """Give the matrix of a factor on the device of a tensor."""
    matrix = factor if isinstance(factor, torch.Tensor) else factor.draw()
    return matrix.to(like.device, torch.float64)
