"""XGBLoRA: boosters of rank 1 on a few random layers, scaled down and merged in each round.

    round t: L_t, a random subset of the adapted layers;  A_0 drawn, B_0 = 0 for each of them
    client k: trains (B_k, A_k) from (B_0, A_0);  effective weight W + s B A
    W <- W + eta s B_bar A_bar for the layers of L_t;  B_bar = sum_k p_k B_k, A_bar likewise

A round trains one booster on top of the merged ones. ``server_lr`` is the shrinkage eta of
boosting; head and biases take that step, too. With all layers and eta = 1 it is Fed-COLA.

- Uplink: r (m + n) numbers per matrix and client, for the matrices of L_t.
- Downlink: a seed, and the updates that the client missed: r (m + n) numbers per matrix and merge,
  at most m n.
- Aggregation: **not exact**, because factors are averaged separately, as in FedAvg-LoRA. The ledger
  has the error of each round (``aggregation_error``). Linear.
- Server: two means and a merge of 2 m n r operations per matrix of L_t.
- Source: Zhang et al., *Less is more: extreme gradient boost rank-1 adaption for efficient
  finetuning of LLMs*, 2024, arXiv 2410.19694.
- Departures: the paper has one client; we run several. Subsets are drawn from ``layers_seed``
  instead of the seed of the run, so that the bytes of a round are known before it. Boosters of rank
  1, merged one after another, and layers drawn at random are the paper's; how many layers, the
  shrinkage and the steps are open settings here, whose defaults are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from typing_extensions import override

from fedraclora.limits import Chance, Positive
from fedraclora.protocol.method import Plan, Traits
from fedraclora.protocol.plan import Ranks
from fedraclora.rng import generator
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class XgbLora(Factored):
    """XGBLoRA: boosters of rank 1 on random layers; each is scaled down, merged and replaced.

    Attributes:
        layers: Share (0, 1] of the adapted layers in a booster, rounded up.
        layers_seed: Seed of the subsets.
        server_lr: eta, the shrinkage.
    """

    carries = False

    rank: Ranks = 1
    layers: Chance = 0.5
    layers_seed: int = 0
    server_lr: Positive = 0.5

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        B, A = replies.mean_factors
        step = self.server_lr * B, A  # W <- W + eta s B_bar A_bar
        return LayerUpdate(merged=step, aggregate=(B, A))

    @override
    def subset(self, plan: Plan, round_: int) -> Plan:
        count = math.ceil(self.layers * len(plan.targets))
        dealt = generator(self.layers_seed, "layers", round_).permutation(len(plan.targets))
        names = [name for name, place in zip(plan.targets, dealt, strict=True) if place < count]
        return replace(plan, targets={name: plan.targets[name] for name in names})

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=False, linear=True, merges=True, step=self.server_lr, varies=True)
