"""SLoRA: a few rounds train sparse full weights; their update initializes FedAvg-LoRA's factors.

    rounds 1..R: client k: trains the entries of W that a shared mask of density d keeps
                 W <- sum_k p_k W_k
    after R:     (W - W_0) / s = U S V^T;  B = U_r S_r^(1/2),  A = S_r^(1/2) V_r^T;  W <- W - s B A
    then:        FedAvg-LoRA from (B, A);  effective weight W + s B A

- Uplink: in the first stage m n numbers per matrix and client, with the zeros outside the mask
  (d m n would do); then r (m + n).
- Downlink: the updates that the client missed, and r (m + n) numbers in the second stage.
- Aggregation: **not exact** in the second stage, as FedAvg-LoRA. The first stage and the step from
  the first to the second are exact. The ledger has the error of each round (``aggregation_error``).
- Server: one mean; once, an SVD of each m x n update.
- Source: Babakniya et al., *SLoRA: federated parameter efficient fine-tuning of language models*,
  2023, arXiv 2308.06522.
- Departures: the part of the update beyond rank r stays in W; the paper drops it. Each factor gets
  the root of S. We assume one mask for the whole first stage, which keeps every entry with
  probability d, as data of clients are not known before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from typing_extensions import override

from fedraclora.limits import Chance, Count
from fedraclora.lowrank.algebra import principal
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Cohort, Draw, Link, Plan, RoundInstructions, State, Traits
from fedraclora.protocol.program import ClientChunk, ClientProgram, GradientStage, Hook
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.strategies.shared.common import (
    as_matrices,
    closed,
    dense_floats,
    dense_means,
    dense_slots,
    turned,
)
from fedraclora.strategies.shared.layerwise import Layer, LayerMethod, LayerUpdate, Replies
from fedraclora.tree import Tree


@dataclass(frozen=True)
class SparseMask(ClientProgram, group="method"):
    """Let clients train a random part of the entries of full weights, the same for all clients.

    Attributes:
        density: The probability with which an entry is trained.
        seeds: Seeds of the masks, by weight.
        turned: The weights that are stored (in, out), whose masks are transposed, too.
    """

    name = "sparse"
    fixes = True

    density: Chance
    seeds: dict[str, int]
    turned: tuple[str, ...] = ()

    def mask(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Draw the mask of a weight, in the shape of its gradient [K, ...] for one client."""
        like = as_matrices(gradient[:1], turned=name in self.turned)
        drawn = generator(self.seeds[name], "mask").random(tuple(like.shape[1:]))
        chosen = torch.from_numpy(drawn < self.density)
        chosen = chosen.mT if name in self.turned else chosen
        return chosen.reshape(gradient.shape[1:]).to(gradient)

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        masks: Tree = {}

        def cut(name: str, gradient: torch.Tensor) -> torch.Tensor:
            if name not in masks:
                masks[name] = self.mask(name, gradient)
            return gradient * masks[name]

        def hook(gradients: Tree, _: Tree) -> Tree:
            return {n: cut(n, g) if n in self.seeds else g for n, g in gradients.items()}

        return {GradientStage.PROGRAM: hook}


@dataclass(frozen=True)
class SLora(LayerMethod):
    """SLoRA: some rounds of sparse full weights, whose change initializes FedAvg-LoRA.

    The rank is bounded by the smaller side.

    Attributes:
        sparse_rounds: R, rounds of the first stage.
        density: d, the share of entries that it trains.
    """

    traits = Traits(exact=False, linear=True, merges=True, varies=True)
    link_rounds = None

    sparse_rounds: Count = 5
    density: Chance = 0.1

    # The second stage: FedAvg-LoRA from the factors that the first one found.

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(carried=replies.means())

    # The first stage: sparse full weights, which are no factors.

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().initial_state(base, plan, draw)
        return replace(state, carried={f"{name}/initial": base[name] for name in plan.targets})

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        plan = state.plan
        if state.counters.sketch:
            return super().open_round(state, round_, cohort, draw)
        full = {name: to_train(plan.shapes[name]) for name in plan.targets}
        seeds = {name: draw.sketch_seed(name) for name in full}
        sparse = SparseMask(self.density, seeds, turned(plan))
        return RoundInstructions(dense=full | dense_slots(state), program=sparse)

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        if sent.adapters:
            return super().close_round(state, sent, uplinks)
        mean, plan = uplinks.mean(), state.plan
        dense = dense_means(state, mean)
        carried, ends = dict(state.carried), state.counters.age + 1 >= self.sparse_rounds
        for name, view in plan.targets.items():
            old, new = state.base[name], mean[name]
            if ends:
                change = view.matrix(new - carried.pop(f"{name}/initial").to(new))
                rank = self.rank_of(plan, name)
                scale = self.scale_of(rank)
                B, A = (t.to(old.dtype) for t in principal(change, rank, scale))
                carried |= {f"{name}/B": B, f"{name}/A": A}
                new = view.stored(view.matrix(new) - scale * B.double() @ A.double(), old)
            dense[name] = new.to(old.dtype)
        exact = {"aggregation_error": 0.0}
        return closed(state, Link({}, dense), carried=carried, ends=ends, report=exact)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        if round_ <= self.sparse_rounds:
            return sum(prod(plan.shapes[n]) for n in plan.targets) + dense_floats(plan), 0
        factors = sum(self.rank_of(plan, n) * sum(v.shape) for n, v in plan.targets.items())
        return factors + dense_floats(plan), factors
