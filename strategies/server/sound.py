"""Whether the weights that a round has merged can be kept."""

from __future__ import annotations

import torch

from fedraclora.aggregation.base import AggregationContext, rows_of, starts
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks, greatest_norm


def overflowing(after: State, before: State) -> list[str]:
    """Name what is too large, or no number, in a new state; unchanged tensors are not looked at.

    From such weights every client would fail, in the next round and in every resume. Of what is
    carried of one layer the norms are multiplied, as its factors are. One pass and no copy.
    """
    new = [*after.base.items(), *after.carried.items(), *after.moments.items()]
    old = {id(t) for tree in (before.base, before.carried, before.moments) for t in tree.values()}
    wrong = [n for n, t in new if id(t) not in old and not _norm(t) <= _limit(t)]
    products: dict[str, float] = {}
    for name, tensor in after.carried.items():
        layer = name.rpartition("/")[0]
        products[layer] = products.get(layer, 1.0) * max(1.0, _norm(tensor))
    limit = min((_limit(t) for t in after.carried.values()), default=0.0)
    return wrong or [layer for layer, product in products.items() if not product <= limit]


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) if tensor.is_floating_point() else 0.0


def _limit(tensor: torch.Tensor) -> float:
    return greatest_norm(tensor.dtype) if tensor.is_floating_point() else 0.0


def largest(got: Uplinks, setting: AggregationContext) -> tuple[int, float]:
    """Find the client whose update has the largest norm, and that norm."""
    norms = torch.linalg.vector_norm(rows_of(got) - starts(setting, got), dim=1)
    place = int(norms.argmax())
    return int(got.clients[place]), float(norms[place])
