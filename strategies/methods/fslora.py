"""FSLoRA: each client trains a random part of the components of both factors.

    round t:  S_k, k_c of the r components, drawn for each client k;  c = r / k_c
    client k: trains the columns S_k of B and the rows S_k of A under W + s c sum_{j in S_k} b_j a_j
    B <- B + sum_k p_k (B_k - B) on the columns S_k;   A <- A + sum_k p_k (A_k - A) on the rows S_k
    effective weight W + s B A

The mean of a client's product over its draw is B A, since c makes up for the components that are
left out. Components that a client lacks count as not moved.

- Uplink: k_c (m + n) numbers per matrix and client.
- Downlink: the same, from the first round on: each client is sent its own components.
- Aggregation: **not exact**, because factors are averaged separately and clients have different
  parts of them. The ledger has the error of each round (``aggregation_error``). The server needs
  each client's own factors.
- Server: two sums of K factors, O(K k_c (m + n)).
- Source: Fang et al., *Federated sketching LoRA: a flexible framework for heterogeneous
  collaborative fine-tuning of large language models*, 2025, arXiv 2501.19389, and its code, from
  which the formulas are.
- Held to: wenzhifang/Federated-Sketching-LoRA-Implementation at ac24177: whole rounds with training
  by AdamW, 3 rounds.
- Departures: all clients have the same number of components; the paper gives each its own. The
  draws have a seed of their own, ``components_seed``. Clients hold c B and a gradient of B times
  c^2, as in the code: under SGD that is the paper's step, under AdamW the steps of B are 1 / c of
  it. In that code no client is sketched, since it compares whole names of parameters with
  ``lora_A`` and ``lora_B``; and it draws other components for B than for A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from typing_extensions import override

from fedraclora.limits import Chance, Count
from fedraclora.protocol.factor import Factor, to_train
from fedraclora.protocol.method import (
    Adapter,
    Cohort,
    Draw,
    Plan,
    RoundInstructions,
    State,
    Traits,
)
from fedraclora.protocol.program import ClientChunk, ClientProgram, GradientStage, Hook
from fedraclora.rng import generator
from fedraclora.strategies.shared.common import dense_floats
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies, RoundContext
from fedraclora.strategies.shared.sound import factors_of
from fedraclora.tree import Tree
from fedraclora.wire.fields import whole_number


@dataclass(frozen=True)
class SketchedTraining(ClientProgram, group="method"):
    """Let clients train components that the server chose for them.

    Attributes:
        round_: The round; the server's choice depends on it.
        squares: c^2 by weight, by which gradients of B are multiplied.
    """

    name = "sketched"

    round_: Count
    squares: dict[str, float]

    @override
    def check(self, downlink: RoundInstructions) -> None:
        whole_number(self.round_, "the round of its components", 1)

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        del chunk

        def scaled(name: str, gradient: torch.Tensor) -> torch.Tensor:
            weight, _, label = name.rpartition("/")
            return gradient * self.squares.get(weight, 1.0) if label == "B" else gradient

        return {GradientStage.PROGRAM: lambda all_, _: {n: scaled(n, g) for n, g in all_.items()}}


@dataclass(frozen=True)
class FsLora(Factored):
    """FSLoRA: each client trains a random part of the components of both factors.

    Attributes:
        share: Share (0, 1] of a layer's components that a client trains, rounded up.
        components_seed: Seed of the draws.
    """

    traits = Traits(exact=False, linear=False, merges=False)
    link_rounds = None

    share: Chance = 0.5
    components_seed: int = 0

    def count(self, rank: int) -> int:
        """Return k_c, the components of a client."""
        return int(np.ceil(self.share * rank))

    def chosen(self, layer: Layer, round_: int, clients: torch.Tensor) -> torch.Tensor:
        """Draw which components of a layer clients train in a round, int64 [K, k_c]."""
        keys = ("components", layer.name, round_)
        drawn = [
            generator(self.components_seed, *keys, client).permutation(layer.rank)
            for client in clients.tolist()
        ]
        return torch.from_numpy(np.sort(np.stack(drawn)[:, : self.count(layer.rank)], axis=1))

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = super().initial_state(base, plan, draw)
        if state.carried or self.probe_rounds:
            return state
        now, carried = RoundContext(1, draw), dict[str, torch.Tensor]()
        for layer in self.layers_of(state):
            for label, factor in factors_of(self, layer, now).items():
                start = factor.opening()
                found = torch.zeros(factor.shape) if start is None else start
                carried[f"{layer.name}/{label}"] = found.to("cpu", layer.dtype).contiguous()
        return replace(state, carried=carried)

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        sent = super().open_round(state, round_, cohort, draw)
        if not sent.program.trains:  # a probe
            return sent
        adapters, squares = dict[str, Adapter](), dict[str, float]()
        for layer in self.layers_of(state):
            at = self.chosen(layer, round_, cohort.clients)
            c = layer.rank / at.shape[1]
            B, A = layer.carried["B"], layer.carried["A"]
            own = {"B": c * B[:, at].movedim(1, 0), "A": A[at]}
            found = {
                label: to_train(tuple(each.shape[1:]), Factor(each.contiguous()))
                for label, each in own.items()
            }
            adapters[layer.name] = Adapter.of(found, layer.scale)
            squares[layer.name] = c * c
        return replace(sent, adapters=adapters, program=SketchedTraining(round_, squares))

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        came = replies.all
        round_ = cast(SketchedTraining, came.sent.program).round_
        at = self.chosen(layer, round_, came.uplinks.clients)
        B, A = (layer.carried[label].to(replies.B, copy=True) for label in ("B", "A"))
        moved_B, moved_A = (self._moved(replies, label) for label in ("B", "A"))
        c = layer.rank / at.shape[1]
        for p, dB, dA, on in zip(replies.p, moved_B, moved_A, at, strict=True):
            B[:, on] += p * dB / c  # B <- B + sum_k p_k (B_k - B)
            A[on] += p * dA
        return LayerUpdate(carried={"B": B, "A": A})

    @staticmethod
    def _moved(replies: Replies, label: str) -> torch.Tensor:
        """Compute the change of each client's factor from what it was sent, [K, ...]."""
        places, came = replies.all.uplinks.places, replies.stack(label)
        start = replies.adapter.factors[label].draw()
        return came - (start if places is None else start[places]).to(came)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        if self.probe_rounds and round_ == 1:
            return super().floats(plan, round_)
        sent = sum(
            self.count(self.rank_of(plan, name)) * sum(view.shape)
            for name, view in plan.targets.items()
        )
        return sent + dense_floats(plan), sent
