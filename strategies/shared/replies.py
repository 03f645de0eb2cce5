"""The factors of one weight that came back from a cohort, beside those that were sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from fedraclora.aggregate import Uplinks
from fedraclora.lowrank import Product, stack_products
from fedraclora.method import Adapter, Downlink, State, Trained
from fedraclora.ranks import within
from fedraclora.tree import Tree
from strategies.shared.products import RoundError, carried_product


@dataclass(frozen=True)
class Replies:
    """The factors of one weight that came back, in float64.

    Attributes:
        B: [K, m, r].
        A: [K, r, n].
        p: Aggregation weights, [K], with sum 1.
        mean: Their means, in the order of `fedraclora.aggregate`.
        kept: Which components each client has, bool [K, r].
        start: The factors before the round, [m, r] and [r, n], where no client has some of their
            components; else None.
    """

    B: torch.Tensor
    A: torch.Tensor
    p: torch.Tensor
    mean: Product
    kept: torch.Tensor
    start: Product | None = None

    @property
    def rank(self) -> int:
        """Components of the adapter."""
        return self.B.shape[2]

    def product(self) -> Product:
        """``sum_k p_k B_k A_k`` as a stack of factors, without the components nobody has."""
        left, right = stack_products(self.B, self.A, self.p)
        kept = self.kept.reshape(-1)
        return left[:, kept], right[kept]


def replies_of(
    state: State, sent: Downlink, got: Uplinks, name: str, stack: Tree, mean: Tree
) -> Replies:
    """Read the factors of one weight off the uplinks, their stack and their mean."""
    B, A = (stack[f"{name}/{label}"].to(torch.float64) for label in ("B", "A"))
    kept = torch.ones(len(B), B.shape[2], dtype=torch.bool)
    if sent.ranks is not None:
        ranks = sent.ranks if got.places is None else sent.ranks[got.places]
        kept = within(ranks, B.shape[2])
    p = got.weights.to(B) / got.total
    start = None
    if not bool(kept.any(dim=0).all()):
        start = carried_product(state, name) or opening_of(sent.adapters[name], B.device)
    return Replies(B, A, p, (mean[f"{name}/B"], mean[f"{name}/A"]), kept.to(B.device), start)


def opening_of(adapter: Adapter, device: torch.device) -> Product:
    """Give factors as they begin, drawn or at zero, in float64."""
    found = []
    for label in ("B", "A"):
        factor = cast(Trained, adapter.factors[label])
        opening = factor.opening()
        zeros = torch.zeros(factor.shape, dtype=torch.float64)
        found.append((zeros if opening is None else opening).to(device, torch.float64))
    return found[0], found[1]


def separate_means_error(state: State, sent: Downlink, got: Uplinks) -> dict[str, float]:
    """Give the figure of `RoundError` for ``B_bar A_bar``; it needs each client's own factors."""
    stack, mean = got.stack(), got.mean()
    error = RoundError()
    for name, adapter in sent.adapters.items():
        replies = replies_of(state, sent, got, name, stack, mean)
        error.add(replies.product(), carried_product(state, name), replies.mean, adapter.scale)
    return error.report()
