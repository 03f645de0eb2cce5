"""Wrap a method so that a rule of `fedraclora.allocation` chooses its adapted layers.

HeteroLoRA (``allocation=heterolora``), in round 1, or every so many rounds:

    exchange 1: clients send the gradients of all adapters where they start ;
                score of a layer: GRAD-NORM ||g_A||_F + ||g_B||_F, or SNIP sum |A g_A| + sum |B g_B|
    exchange 2: they train only the layers with the highest scores, by the method

With SYNFLOW there is no first exchange: the server scores the model without data.

- Bytes: with gradients, a round that chooses costs the uplink of a round over all layers, and its
  downlink once more; every round costs what the method does for the layers that are chosen.
- A method that continues factors chooses once: a layer that is left out later would lose its
training. Methods
  that reset factors each round may choose again.
- Refused: methods whose clients do more than plain local steps, or that change the base weights
before the
  first round, and client state, since the state of omitted layers would be lost.
- Source: Zhang et al., *Unlocking the global synergies in low-rank adapters*, 2024, arXiv
  2406.14956.
- Departures: federated: gradients are those of the mean loss of the cohort, and scores are taken of
  them, where clients could send scores of their own. Its shortcut connections are left out. We know
  the paper by its public code, whose static SNIP adds up masks and not their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

from typing_extensions import override

from fedraclora.allocation import ALLOCATED, CHOOSES_LAYERS, SYNFLOW, AdaLora, HeteroLora, Uniform
from fedraclora.compatibility import conflict
from fedraclora.protocol.method import (
    BEYOND_WEIGHTS,
    DOES_MORE,
    OTHER_LAYERS,
    Cohort,
    Counters,
    Draw,
    Method,
    Plan,
    RoundInstructions,
    State,
    Traits,
)
from fedraclora.protocol.program import GRADIENT, PLAIN
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.shared.common import dense_slots, opening
from fedraclora.strategies.shared.layerwise import LayerMethod
from fedraclora.strategies.wrappers.around import MethodWrapper
from fedraclora.strategies.wrappers.pruned import Pruned
from fedraclora.tree import Tree

Flow = Callable[[Tree, RoundInstructions, Plan], dict[str, float]]


@dataclass(frozen=True)
class Chosen(Counters):
    """Hold the state of a rule.

    Attributes:
        adapted: 1 for a layer of the last choice, else 0, by weight; empty before the first round:
            all.
    """

    adapted: dict[str, int] = field(default_factory=dict)


@ALLOCATED
@CHOOSES_LAYERS
@dataclass(frozen=True)
class Allocated(MethodWrapper):
    """Apply a rule to a method.

    Attributes:
        inner: The method.
        rule: Chooses its layers.
        flow: Computes SYNFLOW scores; None: there is no model.
    """

    counters: ClassVar[type[Chosen]] = Chosen

    rule: HeteroLora
    flow: Flow | None = field(default=None, compare=False)

    @property
    @override
    def traits(self) -> Traits:
        traits = self.inner.traits
        return replace(traits, varies=traits.varies or self.rule.every is not None)

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        return replace(self.inner.initial_state(base, plan, draw), counters=Chosen())

    @override
    def at(self, state: State) -> tuple[Method, State]:
        """Return the method, and the state with the layers of the last choice."""
        adapted = cast(Chosen, state.counters).adapted
        return self.inner, narrowed(state, {n for n in state.plan.targets if adapted.get(n, 1)})

    @override
    def in_effect(self, state: State) -> tuple[Method, State]:
        return self.at(state)

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        if not self.rule.due(round_):
            return super().open_round(state, round_, cohort, draw)
        sent = self.inner.open_round(state, round_, cohort, draw)
        if not sent.program.plain:
            raise conflict(HeteroLora, DOES_MORE, f"the client program {sent.program.name}")
        if sent.adapters.keys() != state.plan.targets.keys():
            raise conflict(HeteroLora, OTHER_LAYERS)
        if self.rule.proxy != SYNFLOW or self.flow is None:
            return replace(sent, program=GRADIENT, dense={})
        chosen = self.rule.chosen(self.flow(state.base, sent, state.plan))
        return replace(sent, adapters={name: sent.adapters[name] for name in chosen})

    @override
    def next_exchange(
        self, state: State, sent: RoundInstructions, uplinks: Uplinks
    ) -> RoundInstructions | None:
        if sent.program != GRADIENT:
            return self.inner.next_exchange(narrowed(state, sent.adapters), sent, uplinks)
        mean = uplinks.mean()
        values: dict[str, Tree] = {}
        gradients: dict[str, Tree] = {}
        for name, adapter in sent.adapters.items():
            slots = {k: f for k, f in adapter.factors.items() if f.trained}
            gradients[name] = {k: mean[f"{name}/{k}"] for k in slots}
            values[name] = {k: opening(f, gradients[name][k]) for k, f in slots.items()}
        chosen = self.rule.chosen(self.rule.scores(values, gradients))
        left = sent if uplinks.places is None else sent.select(uplinks.places)
        adapters = {name: left.adapters[name] for name in chosen}
        return replace(left, adapters=adapters, dense=dense_slots(state), program=PLAIN)

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        after = self.inner.close_round(narrowed(state, sent.adapters), sent, uplinks)
        if after.depends_on_past and self.rule.every is not None:
            raise conflict(HeteroLora, BEYOND_WEIGHTS, f"allocation.every={self.rule.every}")
        adapted = {name: int(name in sent.adapters) for name in state.plan.targets}
        counters = replace(cast(Chosen, after.counters), adapted=adapted)
        report = after.report | {"adapted_layers": float(len(sent.adapters))}
        return replace(after, plan=state.plan, counters=counters, report=report)


def allocated(method: Method, rule: Uniform, flow: Flow | None = None) -> Method:
    """Apply a rule to a method; without a rule, return the method.

    Args:
        method: The method.
        rule: The rule.
        flow: Computes SYNFLOW scores of a downlink's adapters, if there is a model.

    """
    if isinstance(rule, HeteroLora):
        return Allocated(method, rule, flow)
    if not isinstance(rule, AdaLora):
        return method
    return Pruned(cast(LayerMethod, method), rule)


def narrowed(state: State, names: Collection[str]) -> State:
    """Restrict the state to some layers."""
    kept = {name: view for name, view in state.plan.targets.items() if name in names}
    return replace(state, plan=replace(state.plan, targets=kept))
