"""RoLoRA: B and A are trained in alternate rounds, each under the mean of the other.

    odd rounds:  client k: trains B_k from B under A;   B <- sum_k p_k B_k
    even rounds: client k: trains A_k from A under B;   A <- sum_k p_k A_k
    effective weight W + s B A, with B = 0 and A drawn at the start

- Uplink: r m numbers per matrix and client in odd rounds, r n in even ones.
- Downlink: a seed in the first round, r m numbers in the second, then r (m + n), both factors. (A
  client that took part in the round before would need the new factor alone.)
- Aggregation: exact and linear, because all clients have the same frozen factor.
- Rank budgets: client k trains the first r_k components; the others stay as they are.
- Server: one mean, K r m or K r n operations.
- Source: Chen et al., *Robust federated finetuning of LLMs via alternating optimization of LoRA*,
  NeurIPS 2025, arXiv 2502.01755 (earlier 2409.02346). Not the RoLoRA of quantization.
- Departures: none known. A is drawn and B = 0 at the start as in LoRA, with the scale alpha / r; B
  comes first, since A has no gradient while B is zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import DrawnFactorMethod
from fedraclora.strategies.shared.layerwise import (
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
)


@dataclass(frozen=True)
class RoLora(DrawnFactorMethod):
    """RoLoRA: B is trained in odd rounds and A in even ones, each with the mean of the other."""

    traits = Traits(exact=True, linear=True, merges=False, ranks=True, varies=True)
    carries = True

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        A = self.first(layer, now)
        if now.number % 2:
            return {"B": layer.trained("B"), "A": layer.carried.get("A", A)}
        zero = torch.zeros(layer.m, layer.rank, dtype=layer.dtype)
        return {"B": layer.carried.get("B", zero), "A": layer.trained("A", A)}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(carried=replies.means(drawn=False))  # one is a mean, the other as it was
