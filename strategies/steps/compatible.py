"""Refuse incompatible features, before the first round and in each one.

Each part of a run declares its own incompatibilities (`fedraclora.compatibility`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from typing_extensions import override

from fedraclora.compatibility import Features, refuse
from fedraclora.models.built import InitialWeights
from fedraclora.protocol.method import Cohort, RoundInstructions, State
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import RoundStep, Send, step_of
from fedraclora.strategies.wrappers.around import inside
from fedraclora.tree import Tree


class CompatibilityCheck(RoundStep):
    """Compare the features of all parts of a run.

    Args:
        steps: All other steps.
    """

    def __init__(self, steps: Sequence[RoundStep]) -> None:
        self.steps = steps
        self.opens = False  # whether what was looked at last opens a round
        self.found = Features(())  # before the first round

    def parts(self) -> Iterator[object]:
        """Yield the parts of a run that stay the same in all its rounds."""
        run = self.run
        yield from (run, run.loop, run.devices.system, run.local, *run.local.added)
        yield from reversed([*inside(run.method)])  # the method, then its wrappers
        for step in self.steps:
            yield from (step_of(step), step.settings)

    @override
    def begin(self, state: State) -> None:
        plan = state.plan
        weights = InitialWeights(state.base, (*plan.dense, *plan.local))
        budgets = self.run.devices.system.rank_budget is not None
        ranks = torch.ones(2, dtype=torch.int64) if budgets else None
        some = Cohort(torch.arange(2), torch.ones(2), ranks)
        sent = self.run.method.open_round(state, 1, some, self.run.draw)
        self.found = Features([*self.parts(), weights], sent)
        first = self.found.at(sent, sent, sent.program)
        refuse(first.conflicts())
        self.found.known = first.lasting

    @override
    def send(self, sent: RoundInstructions, state: State) -> RoundInstructions:
        self._check(sent)
        self.opens = True
        return sent

    @override
    def receive(self, send: Send, exchange: Exchange, base: Tree) -> None:
        if not self.opens:  # a later exchange of the round
            self._check(exchange.downlink)
        self.opens = False

    def _check(self, sent: RoundInstructions) -> None:
        refuse(self.found.at(sent, sent, sent.program).conflicts(each_round=True))
