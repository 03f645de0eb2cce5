"""Stopping early: when a metric of the validation split has not improved for some evaluations.

Whether to stop is read off the ledger, so that a run that is resumed stops where it would have
stopped. The run ends with the weights of its last round; the summary names the best round beside
it, with the metrics of that round, and the chain rebuilds the base weights of any round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedraclora.config.settings import StopConfig
from fedraclora.errors import unknown
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.run.ledger import Row, number
from fedraclora.tree import Tree


@dataclass(frozen=True)
class Stopping:
    """Says when a run has come to its end before its last round.

    Attributes:
        config: Metric and patience; without patience nothing is measured and nothing stops.
        measure: Gives the metrics of dense weights on the validation split.
    """

    config: StopConfig = field(default_factory=StopConfig)
    measure: Callable[[Tree], dict[str, float]] | None = None

    def columns(self, weights: Tree) -> Row:
        """Compute the ledger's column ``validation``; none where it decides nothing.

        Raises:
            ConfigError: If the metric is not among those of the data set.
        """
        if self.config.patience is None or self.measure is None:
            return {}
        found = self.measure(weights)
        if self.config.metric not in found:
            raise unknown("stop.metric", self.config.metric, found)
        return {"validation": found}

    def best(self, rows: Sequence[Row]) -> Row | None:
        """Find the row of the best evaluation, the first of equals; None without any."""
        measured = [row for row in rows if "validation" in row]
        return min(measured, key=self._cost, default=None)

    def due(self, rows: Sequence[Row]) -> bool:
        """Check whether the last ``patience`` evaluations have not improved on one before them."""
        if self.config.patience is None or (best := self.best(rows)) is None:
            return False
        after = sum("validation" in r and number(r, "round") > number(best, "round") for r in rows)
        return after >= self.config.patience

    def _cost(self, row: Row) -> float:
        value = number(row, "validation", self.config.metric)
        if math.isnan(value):
            return math.inf
        return -value if higher_is_better(self.config.metric) else value
