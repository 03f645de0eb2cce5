"""FedAvg on full weights, the baseline of all low-rank methods.

    client k: trains all of W_k from W;   W <- sum_k p_k W_k

- Uplink: m n numbers per matrix.
- Downlink: the updates that the client missed, at most m n numbers per matrix.
- Aggregation: exact and linear.
- Source: McMahan et al., *Communication-efficient learning of deep networks from decentralized
  data*, AISTATS 2017, arXiv 1602.05629.
- Departures: head and biases follow the settings of the run, so that a comparison with adapters
  changes one thing only. Biases of adapted layers are trained with ``bias=full``; those of other
  layers (of a LayerNorm) if ``modules_to_save`` names the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from typing_extensions import override

from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import (
    Cohort,
    Draw,
    Link,
    Method,
    Plan,
    RoundInstructions,
    State,
    Traits,
    apply_link,
)
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.shared.common import dense_floats, dense_slots
from fedraclora.tree import Tree


@dataclass(frozen=True)
class FedAvg(Method):
    """FedAvg: every weight trained and averaged in full (biases: see bias and modules_to_save)."""

    traits = Traits(exact=True, linear=True, merges=True)

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        return State(base, plan)

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        full = {n: to_train(tuple(state.base[n].shape)) for n in state.plan.weights}
        return RoundInstructions(dense=full | dense_slots(state))

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        mean = uplinks.mean()
        link = Link(dense={n: mean[n].to(state.base[n].dtype) for n in sent.uploaded()})
        return replace(state, base=apply_link(state.base, link, state.plan), link=link, notes=())

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        return sum(prod(plan.shapes[n]) for n in plan.weights) + dense_floats(plan), 0
