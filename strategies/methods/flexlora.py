"""FlexLoRA: the mean of the clients' products, truncated to rank r and sent to the clients.

    client k: trains (B_k, A_k) from the first r_k components of (B, A)
    sum_k p_k B_k A_k = U S V^T;   B <- U_r S_r^(1/2),  A <- S_r^(1/2) V_r^T
    effective weight W + s B A

- Uplink: r (m + n) numbers per matrix and client; r_k (m + n) with rank budgets.
- Downlink: r (m + n) numbers after the first round, also with rank budgets, where the components
  that a client does not train are zero.
- Aggregation: **not exact**, because of the truncation to rank r. The ledger has the error of each
  round (``aggregation_error``). The server needs each client's own factors.
- Server: two QRs and a small SVD of the stacked factors, O((m + n) (K r)^2 + (K r)^3).
- Source: Bai et al., *Federated fine-tuning of large language models under heterogeneous tasks and
  client resources*, NeurIPS 2024, arXiv 2402.11505.
- Held to: alibaba/FederatedScope at 1cb1ab76: the server's step, 3 rounds.
- Departures: the scale is alpha / r for all clients; the paper's is alpha / r_k. Each factor gets
  the root of S; the public code puts S into B. The product is the same, local steps are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.lowrank.algebra import balanced_factors
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class FlexLora(Factored):
    """FlexLoRA: the mean of the products, cut to the rank and redistributed."""

    truncates = True

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        B, A = balanced_factors(*replies.product(), layer.rank)  # U_r S_r^(1/2), S_r^(1/2) V_r^T
        return LayerUpdate(carried={"B": B, "A": A})

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=False, linear=False, merges=False, ranks=not self.starts_with_factors)
