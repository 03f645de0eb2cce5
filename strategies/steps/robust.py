"""A robust rule in the place of the mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, Aggregator, Mean
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.round_step import RoundStep


class RobustRule(RoundStep):
    """Gives the method what a rule makes of the updates.

    Args:
        aggregator: The rule.
    """

    key = "aggregator"

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = self.settings = aggregator
        self.individuals = aggregator.individuals

    @override
    @classmethod
    def of(cls, chosen: Mapping[str, Any]) -> RobustRule | None:
        rule = chosen.get("aggregator", Mean())
        return None if isinstance(rule, Mean) else cls(rule)

    @override
    def begin(self, state: State) -> None:
        self.aggregator.check(self.run.loop.cohort)

    @override
    def treat(self, got: Uplinks, context: AggregationContext) -> Uplinks:
        return self.aggregator(got, context)
