"""Looks through the table of what does not go together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext
from fedraclora.protocol.method import Cohort, Downlink, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.steps.conflicts import CONFLICTS, Conflict
from fedraclora.strategies.steps.features import Setup
from fedraclora.strategies.steps.settings import RoundSettings

IN_ROUNDS = tuple(row for row in CONFLICTS if row.in_rounds)


class Fits(RoundStep):
    """Refuses what does not go together, before the first round and in each.

    Args:
        chosen: The settings of the steps.
    """

    def __init__(self, chosen: RoundSettings) -> None:
        self.chosen = chosen
        self.sent: Downlink | None = None  # what was looked at last

    @override
    def begin(self, state: State) -> None:
        budgets = self.run.devices.system.rank_budget is not None
        ranks = torch.ones(2, dtype=torch.int64) if budgets else None
        some = Cohort(torch.arange(2), torch.ones(2), ranks)
        self._check(CONFLICTS, self.run.method.open_round(state, 1, some, self.run.draw))

    @override
    def send(self, sent: Downlink, state: State) -> Downlink:
        self._check(IN_ROUNDS, sent)
        self.sent = sent
        return sent

    @override
    def treat(self, got: Uplinks, context: AggregationContext) -> Uplinks:
        if context.sent is not self.sent:  # it may be that of a later exchange
            self._check(IN_ROUNDS, context.sent)
        return got

    def _check(self, rows: Iterable[Conflict], sent: Downlink) -> None:
        setup = Setup(self.chosen, self.run, sent)
        for row in rows:
            row.check(setup)
