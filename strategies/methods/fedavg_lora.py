"""FedAvg-LoRA (FedIT), and in links COLA and ReLoRA: both factors trained, averaged separately.

    client k: trains (B_k, A_k) from (B_bar, A_bar)
    B_bar <- sum_k p_k B_k;   A_bar <- sum_k p_k A_k;   effective weight W + s B_bar A_bar
    every ``merge_every`` rounds: W <- W + s B_bar A_bar, and both factors begin anew

One factor begins as a drawing and the other at zero, so a new link leaves the weights as they are.
``merge_every = None`` is one link without end: FedAvg-LoRA, and LoRA where there is one client.
Links with one client are COLA; ReLoRA also keeps a share of the optimizer's moments and warms the
step size up anew, which are local settings (``local=relora``).

- Uplink: r (m + n) numbers per matrix and client. Downlink: the same; a seed where a link begins,
  and then what the client missed: r (m + n) numbers per link that was merged, at most m n.
- Aggregation: **not exact**. The mean of the clients' weights is W + s sum_k p_k B_k A_k; what is
  missed is s sum_k p_k (B_k - B_bar)(A_k - A_bar). Its norm, relative to that of the mean change
  of the round, is reported each round as ``aggregation_error``. One client misses nothing.
- Source: Zhang et al., *Towards building the federated GPT: federated instruction tuning*,
  ICASSP 2024, arXiv 2305.05644; LoRA: Hu et al., ICLR 2022, arXiv 2106.09685. COLA: Xia, Qin and
  Hazan, *Chain of LoRA*, 2024, arXiv 2401.04151. ReLoRA: Lialin et al., ICLR 2024, arXiv
  2307.05695.
- Departures: a drawn A starts kaiming-uniform, as in PEFT, and so does a drawn B, by its own m
  (PEFT's rule would take its r). The links of several clients are ours: COLA and ReLoRA have one.
  ReLoRA's training of all weights before the first link is what ``pretrain`` does, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from fedraclora.limits import Count
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class FedAvgLora(Factored):
    """FedAvg-LoRA (FedIT): both factors trained, averaged separately; its error is measured.

    Attributes:
        merge_every: Rounds between merges; None = never.
    """

    carries = False
    cuts_components = True

    merge_every: Count | None = None

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        B, A = replies.mean_factors  # sum_k p_k B_k and sum_k p_k A_k
        if layer.ends:
            return LayerUpdate(merged=(B, A))  # W <- W + s B_bar A_bar
        return LayerUpdate(carried={"B": B, "A": A})

    @property
    @override
    def traits(self) -> Traits:
        merges = self.merge_every is not None
        return Traits(exact=False, linear=True, merges=merges)
