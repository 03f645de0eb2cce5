"""Aggregators: what happens to checked uplinks before the method sees them.

An aggregator may keep clients apart (robust rules), reduce them to their sum (as secure
aggregation does), or change them (clipping, noise). It knows what was sent, so that it can tell
an update from its start, and has the seed tree for its own draws.
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
    """What an aggregator may know beside the uplinks: ``base`` is what clients trained from."""

    sent: RoundInstructions
    round_: int
    draw: Draw
    base: Tree = field(default_factory=dict)


def starts(setting: AggregationContext, got: Uplinks) -> torch.Tensor:
    """Return the values from which clients started what they uploaded; see `opening_rows`."""
    places = torch.arange(len(got.clients)) if got.places is None else got.places
    return opening_rows(setting.sent, setting.base, got.layout, places)


class Aggregator(Limited, group="aggregator"):
    """Between the checks of what came and the method: a frozen dataclass with one function.

    Attributes:
        name: Its key in the config.
        individuals: Whether it looks at single clients; if not, their sum is enough.
        estimates: Whether what it hands on is one vector for the whole cohort.
        compares: Whether it compares clients, who must then have trained the same thing.
    """

    name: ClassVar[str]
    individuals: ClassVar[bool] = True
    estimates: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    def check(self, cohort: int) -> None:
        """Reject a number of clients per round that this cannot serve.

        Raises:
            ConfigError: Saying why.
        """

    @abstractmethod
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        """Turn the clients' uploads into what the method sees."""

    @Feature("another aggregator than mean", instead="aggregator=mean")
    def _rule(self) -> str:
        return f"aggregator={self.name}"

    @Feature("a rule that looks at single updates", instead="aggregator=mean")
    def _individual_rule(self) -> str:
        return self._rule() if self.individuals else ""

    @Feature(
        "a rule that makes one vector of a cohort",
        instead="aggregator=multi_krum, krum, norm_bound or mean",
        avoids={"a method that needs each client's own update": "it hands on that vector alone"},
    )
    def _estimating_rule(self) -> str:
        return self._rule() if self.estimates else ""

    @Feature(
        "a rule that compares clients",
        instead="aggregator=norm_bound or mean",
        avoids={"other things to train at each client": "unlike numbers cannot be compared"},
    )
    def _comparing_rule(self) -> str:
        return self._rule() if self.compares else ""


@dataclass(frozen=True)
class Mean(Aggregator):
    """Plain weighted averaging."""

    name: ClassVar[str] = "mean"
    individuals: ClassVar[bool] = False

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        return got

    @override
    def _rule(self) -> str:
        return ""


@dataclass(frozen=True)
class Total(Aggregator):
    """The method sees the weighted sum only."""

    name: ClassVar[str] = "sum"
    individuals: ClassVar[bool] = False
    estimates: ClassVar[bool] = True

    @override
    def __call__(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        if got.stacked is None:
            return got
        return replace(got, stacked=None, summed=got.sum())


def rows_of(got: Uplinks) -> torch.Tensor:
    """Stack what each client sent, float64 [K, P].

    Raises:
        ShapeError: If only the sum is known.
    """
    return got.rows().double().cpu()


mean = Mean()
