"""LoRA-FAIR: FedAvg-LoRA with a correction of B that the server fits.

    client k: trains (B_k, A_k) from (B, A)
    B_bar = sum_k p_k B_k;   A <- sum_k p_k A_k;   R = sum_k p_k B_k A_k - B_bar A
    D = argmin ||R - D A||_F^2 + ridge ||D||_F^2 = R A^T (A A^T + ridge I)^(-1);   B <- B_bar + D
    effective weight W + s B A

- Uplink: r (m + n) numbers per matrix and client. Downlink: the same after the first round.
- Aggregation: **not exact**: the correction cannot reach what lies outside the row space of A. The
  ledger has the error of each round (``aggregation_error``). The server needs each client's own
  factors.
- Server: products of the stacked factors with A^T, O((m + n) K r^2), and an r x r solve.
- Source: Bian et al., *LoRA-FAIR: federated LoRA fine-tuning with aggregation and initialization
  refinement*, ICCV 2025, arXiv 2411.14961.
- Departures: the paper maximizes a cosine similarity with SGD on the server. A cosine ignores
  magnitude; the squared distance here does not, and has a closed form. The default of ``ridge`` is
  0.01, which a summary of the paper gives for its penalty, though it weighs another distance here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.limits import Positive
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class LoraFair(Factored):
    """LoRA-FAIR: FedAvg-LoRA with B corrected on the server towards the mean product.

    Attributes:
        ridge: Weight of the penalty on the correction D; positive.
    """

    traits = Traits(exact=False, linear=False, merges=False)

    ridge: Positive = 0.01

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        (B, A), rest = replies.mean_factors, replies.residual
        if rest is not None:
            gram = A @ A.mT + self.ridge * torch.eye(len(A), dtype=A.dtype, device=A.device)
            onto = rest[0] @ (rest[1] @ A.mT)  # R A^T
            B = B + torch.linalg.solve(gram, onto.mT).mT
        return LayerUpdate(carried={"B": B, "A": A})
