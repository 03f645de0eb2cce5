"""HetLoRA: factors of several ranks, padded with zeros and averaged by the norms of their products.

    client k: trains (B_k, A_k) from the first r_k components of (B, A)
    w_k = p_k ||B_k A_k||_F / sum_j p_j ||B_j A_j||_F
    B <- sum_k w_k B_k;  A <- sum_k w_k A_k, padded;   effective weight W + s B A

- Uplink: r (m + n) numbers per matrix and client; r_k (m + n) with rank budgets.
- Downlink: r (m + n) numbers after the first round, also with rank budgets, where the components
  that a client does not train are zero.
- Aggregation: **not exact**, because factors are averaged separately and weighted by their norms.
  The ledger has the error of each round (``aggregation_error``). The server needs each client's
  own factors.
- Server: a mean of K factors and K norms, O(K (m + n) r^2).
- Source: Cho et al., *Heterogeneous LoRA for federated fine-tuning of on-device foundation models*,
  EMNLP 2024, arXiv 2401.06432.
- Departures: ranks are the budgets of the clients' devices and do not change: the penalty on
  trailing components and the pruning of ranks are left out. The scale is alpha / r for all. The
  norms multiply the run's aggregation weights; the paper's weights are those of
  ``aggregation_weights=uniform``. If all clients of a round send zeros, they are averaged by p_k.
  Components that no client of a round trains stay as they were: a mean of padding would set both
  factors to zero, from which they could never be trained again. We assume alpha / r with one r for
  all clients, so that a component weighs the same at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.lowrank.algebra import product_norm
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class HetLora(Factored):
    """HetLoRA: factors padded with zeros, averaged by the norms of their products."""

    truncates = True

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        kept, p = replies.kept, replies.p
        Bs, As = replies.B * kept[:, None].to(p), replies.A * kept[..., None].to(p)
        norms = [product_norm(B, A) for B, A in zip(Bs, As, strict=True)]
        w = p * torch.tensor(norms, dtype=torch.float64).to(p)
        w = w / w.sum() if any(norms) else p
        B, A = ((w[:, None, None] * factor).sum(dim=0) for factor in (Bs, As))
        covered = kept.any(dim=0)
        if not bool(covered.all()):  # components that no client of this round has
            B0, A0 = replies.start
            B, A = B.where(covered, B0), A.where(covered[:, None], A0)
        return LayerUpdate(carried={"B": B, "A": A})

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=False, linear=False, merges=False, ranks=not self.starts_with_factors)
