"""FLoRA (stacking): both factors start new in each round; their products are merged exactly.

    client k: B_k = 0, A_k = A_0 (drawn for the round), trains both
    W <- W + s [p_1 B_1, .., p_K B_K] [A_1; ..; A_K] = W + s sum_k p_k B_k A_k

- Uplink: r (m + n) numbers per matrix and client; r_k (m + n) with rank budgets.
- Downlink: a seed, and the updates that the client missed: (sum_k r_k) (m + n) numbers per round,
  at most m n.
- Aggregation: exact, also with rank budgets, because all clients have the same scale s. The server
  needs each client's own factors.
- Server: it stacks the K products; the merge costs 2 m n K r operations.
- Source: Wang et al., *FLoRA: federated fine-tuning large language models with heterogeneous
  low-rank adaptations*, NeurIPS 2024, arXiv 2409.05976. Not the FLORA of arXiv 2402.03293.
- Held to: ATP-1010/FederatedLLM at 7bea158: the server's step, 3 rounds.
- Departures: the clients of a round start from one drawing, sent as a seed; in the public code each
  has its own. The scale is alpha / r for all clients; the paper's is alpha / r_k.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class FloraStacking(Factored):
    """FLoRA: both factors start new in each round; their products are stacked and merged."""

    traits = Traits(exact=True, linear=False, merges=True, ranks=True)
    carries = False

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(merged=replies.product())  # W <- W + s sum_k p_k B_k A_k
