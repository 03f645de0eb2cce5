"""A robust rule in the place of the mean."""

from __future__ import annotations

from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, Aggregator
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.round_step import RoundStep


class RobustRule(RoundStep):
    """Gives the method what a rule makes of the updates.

    Args:
        aggregator: The rule.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator, self.individuals = aggregator, aggregator.individuals

    @override
    def begin(self, state: State) -> None:
        self.aggregator.check(self.run.loop.cohort)

    @override
    def treat(self, got: Uplinks, context: AggregationContext) -> Uplinks:
        return self.aggregator(got, context)
