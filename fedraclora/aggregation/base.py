"""Define aggregators, which process checked uplinks before the method sees them.

An aggregator may keep clients apart (robust rules), reduce them to their sum (as secure
aggregation does), or change them (clipping, noise). It knows the downlink, so that it can subtract
the start from an upload, and has the seed tree for its own draws.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.limits import Limited
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import Draw, RoundInstructions
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.tree import Tree


@dataclass(frozen=True)
class AggregationContext:
    """Hold an aggregator's inputs beside the uplinks; clients trained from ``base``."""

    sent: RoundInstructions
    round_: int
    draw: Draw
    base: Tree = field(default_factory=dict)


def starts(setting: AggregationContext, uplinks: Uplinks) -> torch.Tensor:
    """Return the values from which clients started their uploads; see `opening_rows`."""
    places = torch.arange(len(uplinks.clients)) if uplinks.places is None else uplinks.places
    return opening_rows(setting.sent, setting.base, uplinks.layout, places)


class Aggregator(Limited, group="aggregator"):
    """Turn checked uploads into the method's input: a frozen dataclass with one function.

    Attributes:
        name: Its key in the config.
        individuals: Whether it needs the uploads of single clients; if not, their sum is enough.
        estimates: Whether its result is one vector for all clients of the round.
        compares: Whether it compares clients, which must then have trained the same tensors.
    """

    name: ClassVar[str]
    individuals: ClassVar[bool] = True
    estimates: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def check(self, cohort: int) -> None:
        """Reject a number of clients per round that this aggregator does not support.

        Raises:
            ConfigError: Saying why.
        """

    @abstractmethod
    def __call__(self, uplinks: Uplinks, setting: AggregationContext) -> Uplinks:
        """Turn the clients' uploads into the method's input."""

    @Feature("an aggregator other than mean", instead="aggregator=mean")
    def _rule(self) -> str:
        return f"aggregator={self.name}"

    @Feature("a robust rule that needs each client's update", instead="aggregator=mean")
    def _individual_rule(self) -> str:
        return self._rule() if self.individuals else ""

    @Feature(
        "a robust rule that returns one update for the round",
        instead="aggregator=multi_krum, krum, norm_bound or mean",
        avoids={
            "a method that needs each client's update": (
                "the method gets that one update and no others"
            )
        },
    )
    def _estimating_rule(self) -> str:
        return self._rule() if self.estimates else ""

    @Feature(
        "a robust rule that compares clients",
        instead="aggregator=norm_bound or mean",
        avoids={
            "clients that train different parameters": (
                "their updates cannot be compared number by number"
            )
        },
    )
    def _comparing_rule(self) -> str:
        return self._rule() if self.compares else ""


@dataclass(frozen=True)
class Mean(Aggregator):
    """Average the uploads with their weights."""

    name: ClassVar[str] = "mean"
    individuals: ClassVar[bool] = False

    @override
    def __call__(self, uplinks: Uplinks, setting: AggregationContext) -> Uplinks:
        return uplinks

    @override
    def _rule(self) -> str:
        return ""


@dataclass(frozen=True)
class Total(Aggregator):
    """Reduce the uploads to their weighted sum."""

    name: ClassVar[str] = "sum"
    individuals: ClassVar[bool] = False
    estimates: ClassVar[bool] = True

    @override
    def __call__(self, uplinks: Uplinks, setting: AggregationContext) -> Uplinks:
        if uplinks.stacked is None:
            return uplinks
        return replace(uplinks, stacked=None, summed=uplinks.sum())


def rows_of(uplinks: Uplinks) -> torch.Tensor:
    """Stack the uploads of each client, float64 [K, P].

    Raises:
        ShapeError: If only the sum is known.
    """
    return uplinks.rows().double().cpu()


mean = Mean()
