"""FedAvg-LoRA (FedIT): both factors trained, averaged separately. Also COLA, ReLoRA and FedLoRU.

    client k: trains (B_k, A_k) from (B_bar, A_bar)
    B_bar <- sum_k p_k B_k;   A_bar <- sum_k p_k A_k;   effective weight W + s B_bar A_bar
    every ``merge_every`` rounds: W <- W + s B_bar A_bar, and both factors start anew

New factors are a random one and a zero one, so that the effective weights stay as they are after a
merge. ``merge_every = None`` never merges: FedAvg-LoRA, or LoRA if there is one client. With one
client and merges it is COLA. ReLoRA also keeps a part of the optimizer's moments and repeats the
learning rate's warm-up after each merge; these are local settings (``local=relora``). With several
clients and merges every few rounds it is FedLoRU.

- Uplink: r (m + n) numbers per matrix and client.
- Downlink: r (m + n) numbers, or a seed in a round that starts with new factors. With merges also
  the updates that the client missed: r (m + n) numbers per merge, at most m n.
- Aggregation: **not exact**. The mean of the clients' weights is W + s sum_k p_k B_k A_k, which
  differs by s sum_k p_k (B_k - B_bar)(A_k - A_bar). The ledger has the norm of this difference in
  each round, relative to the norm of the mean update (``aggregation_error``). It is zero for one
  client.
- Source: Zhang et al., *Towards building the federated GPT: federated instruction tuning*,
  ICASSP 2024, arXiv 2305.05644; LoRA: Hu et al., ICLR 2022, arXiv 2106.09685. COLA: Xia, Qin and
  Hazan, *Chain of LoRA*, 2024, arXiv 2401.04151. ReLoRA: Lialin et al., ICLR 2024, arXiv
  2307.05695. FedLoRU: Park and Klabjan, 2024, arXiv 2409.12371, and its code.
- Held to: JayZhang42/FederatedGPT-Shepherd at bcffa00: the server's step, 3 rounds;
  Guitaricet/relora at 2881b5f: 3 merges, and the moments that are kept (ReLoRA);
  haemPark/fedloru_official at 219688b: the server's step and the merges, 4 rounds (FedLoRU).
- Departures: a drawn A is Kaiming-uniform, as in PEFT. A drawn B is, too, with its own m as the
  fan-in (PEFT's rule would use r). COLA and ReLoRA are defined for one client; we also run them
  with several. The command of FedLoRU's code merges and keeps the factors, so that the effective
  weights jump by their product; here new ones begin, as by another flag of that code. Its cycle is
  50 of 400 rounds, ours 4. ReLoRA first trains all weights for a while; set ``pretrain`` for that.
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
