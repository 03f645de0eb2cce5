"""FRLoRA: in every round both factors start from the principal part of the initial weights.

    once:     W = U S V^T;  B_0 = U_r (S_r / s)^(1/2),  A_0 = (S_r / s)^(1/2) V_r^T
              W <- W - s B_0 A_0
    client k: trains (B_k, A_k) from (B_0, A_0);  effective weight W + s B A
    B_bar = sum_k p_k B_k;  A_bar = sum_k p_k A_k;  W <- W + s (B_bar A_bar - B_0 A_0)

- Uplink: r (m + n) numbers per matrix and client.
- Downlink: r (m + n) numbers, also in the first round, and the updates that the client missed:
  2 r (m + n) numbers per round, at most m n. (A client that stored B_0 and A_0 would need half of
  that.) W - s B_0 A_0 is not sent: clients compute it from the factors of the first round.
- Aggregation: **not exact**, because factors are averaged separately, as in FedAvg-LoRA. The ledger
  has the error of each round (``aggregation_error``).
- Refused: ``compression.downlink`` below 32 bits, which would round the part of W that B_0 and A_0
  hold.
- Server: two means and a merge of 4 m n r operations; an SVD of each matrix before the first round.
- Source: Yan et al., *Federated residual low-rank adaptation of large language models*, ICLR 2025,
  OpenReview e0rQRMUhs7 (no arXiv number was found).
- Held to: IAMJackYan/FRLoRA at c29baad: the start and the server's step, 3 rounds.
- Departures: the run's aggregation weights; the public code has uniform ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.lowrank.algebra import negated, sum_products
from fedraclora.protocol.method import Draw, Plan, State, Traits
from fedraclora.strategies.shared.initials import begin
from fedraclora.strategies.shared.layerwise import Layer, LayerMethod, LayerUpdate, Replies
from fedraclora.tree import Tree


@dataclass(frozen=True)
class FrLora(LayerMethod):
    """FRLoRA: rounds start from the principal part of the initial weights, and merge the change.

    The rank is bounded by the smaller side.
    """

    traits = Traits(exact=False, linear=True, merges=True)
    starts_with_factors = True
    carries = True

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().initial_state(base, plan, draw)
        return begin(state, "pissa", *self.ranks_and_scales(plan), draw)

    @override
    def _takes_from_weights(self) -> str:
        return "method=frlora"

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        first = layer.carried["B"], layer.carried["A"]  # B_0, A_0: they stay
        B, A = (mean.to(layer.dtype) for mean in replies.mean_factors)
        step = sum_products((B, A), negated(first))  # B_bar A_bar - B_0 A_0
        return LayerUpdate(layer.carried, merged=step, aggregate=replies.mean_factors)
