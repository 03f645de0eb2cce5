"""FedSA-LoRA: both factors are trained; A is averaged, and each client keeps its own B.

    client k: trains (B_k, A_k) from (its own B_k, A);   A <- sum_k p_k A_k
    effective weight of client k: W + s B_k A

- Uplink: r n numbers per matrix and client. Downlink: a seed in the first round, then r n.
- Aggregation: the mean of A is exact and linear. There is no global model: each client has its own
  weights. The server's weights W are those of a client that has not trained yet (B = 0).
- Client state: B_k, r m numbers per matrix, kept over rounds.
- Server: one mean, K r n operations.
- Source: Guo et al., *Selective aggregation for low-rank adaptation in federated learning*, ICLR
  2025, arXiv 2410.01463.
- Held to: Pengxin-Guo/FedSA-LoRA at fc276b5: the server's step, 3 rounds.
- Departures: the head follows the settings of the run. In the public code each client keeps its
  own (``head=personal``).
"""

from __future__ import annotations

from dataclasses import dataclass

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
class FedSaLora(DrawnFactorMethod):
    """FedSA-LoRA: both factors trained, A averaged, B kept by each client (personal models)."""

    traits = Traits(exact=True, linear=True, merges=False)
    link_rounds = None
    client_state = True

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        return {
            "B": layer.trained("B", upload=False),  # a client's own
            "A": layer.trained("A", self.first(layer, now)),
        }

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(carried={"A": replies.mean("A")})  # A <- sum_k p_k A_k
