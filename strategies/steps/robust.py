"""Simulate attackers, and apply a robust rule in place of the mean.

Colluding attackers act where all updates are known.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, Aggregator, rows_of
from fedraclora.attacks import Attack, same_shape
from fedraclora.data.own_loss import PASSING
from fedraclora.errors import ConfigError
from fedraclora.imports import as_user_error
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import Row
from fedraclora.schema import of_project
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.server.sound import checked_uplinks


class Attackers(RoundStep):
    """Change the attackers' updates, and count them.

    Args:
        attack: What they do.
    """

    attackers: torch.Tensor  # their ids, int64

    def __init__(self, attack: Attack) -> None:
        self.attack, self.individuals = attack, attack.colludes

    @override
    def begin(self, state: State) -> None:
        self.attackers = self.attack.attackers(self.run.loop.seed, self.run.loop.clients)

    @override
    def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
        if not self.attack.colludes:
            return uplinks
        rows = rows_of(uplinks)
        agreed = self.attack.colluded(rows, torch.isin(uplinks.clients, self.attackers))
        return replace(uplinks, stacked=same_shape(self.attack, agreed, rows))

    @override
    def columns(self, exchange: Exchange, uplinks: Uplinks | None) -> Row:
        if not self.attack.share:
            return {}
        asked = exchange.first.cohort.clients
        return {"attackers": int(torch.isin(asked, self.attackers).sum())}


class RobustRule(RoundStep):
    """Pass the result of a robust rule to the method.

    Args:
        aggregator: The rule.
    """

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator, self.individuals = aggregator, aggregator.individuals

    @override
    def begin(self, state: State) -> None:
        self.aggregator.check(self.run.loop.cohort)

    @override
    def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
        if of_project(type(self.aggregator)):
            return self.aggregator(uplinks, context)
        who = f"the aggregator {type(self.aggregator).__name__}"
        with as_user_error(ConfigError, f"{who}: ", "calling it", passing=PASSING):
            found = self.aggregator(uplinks, context)
        return checked_uplinks(who, found, self.aggregator, (uplinks,))
