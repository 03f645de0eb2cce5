"""FedEx-LoRA: FedAvg-LoRA, with the error of averaging factors added to the base weights.

    client k: trains (B_k, A_k) from (B_bar, A_bar)
    B_bar <- sum_k p_k B_k;   A_bar <- sum_k p_k A_k
    W <- W + s (sum_k p_k B_k A_k - B_bar A_bar)

The residual equals sum_k p_k (B_k - B_bar)(A_k - A_K), since sum_k p_k (B_k - B_bar) = 0. The term
of the last client is zero, so the rank is (K - 1) r. ``residual_rank`` truncates it.

- Uplink: r (m + n) numbers per matrix and client.
- Downlink: r (m + n) numbers after the first round, and the updates that the client missed:
  (K - 1) r (m + n) numbers per round (truncated: residual_rank (m + n)), at most m n.
- Aggregation: exact, unless the residual is truncated; then the ledger has the error of each round
  (``aggregation_error``). The server needs each client's own factors.
- Server: the merge, 2 m n (K - 1) r operations. A truncated residual costs two QRs and a small SVD,
  O((m + n) (K r)^2 + (K r)^3), and a merge of 2 m n residual_rank.
- Source: Singhal et al., *FedEx-LoRA: exact aggregation for federated and efficient fine-tuning of
  large language models*, ACL 2025, arXiv 2410.09432.
- Held to: CERT-Lab/fedex-lora at 2fa2e4a: the server's step, 3 rounds.
- Departures: both sums have the aggregation weights p_k of the run. In the public code all clients
  have equal ones, and the residual of every layer is transposed, as GPT-2's ``Conv1D`` needs it and
  ``torch.nn.Linear`` does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.limits import Count
from fedraclora.lowrank.algebra import Product, balanced_factors
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class FedExLora(Factored):
    """FedEx-LoRA: FedAvg-LoRA, with the error of separate averages added to the base weights.

    Attributes:
        residual_rank: Components of the residual to merge; None: all.
    """

    link_rounds = None
    cuts_components = True

    residual_rank: Count | None = None

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        B, A = replies.mean_factors
        rest: Product | None = replies.residual  # sum_k p_k B_k A_k - B_bar A_bar
        if rest is not None and self.residual_rank is not None:
            rest = balanced_factors(*rest, min(self.residual_rank, rest[0].shape[1]))
        return LayerUpdate(carried={"B": B, "A": A}, merged=rest)

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=self.residual_rank is None, linear=False, merges=True)
