"""What clients send of what they measured on samples of their own, and what that comes to.

A client sends the sums of which metrics are made (`fedraclora.evaluation.metrics`), by which the
server has each metric of each client, and by their sum that of all samples together. Of a metric
that needs every score it sends the value alone, and of all samples together nobody knows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.evaluation.evaluate import state_of
from fedraclora.evaluation.metrics import Measure, Owners, higher_is_better
from fedraclora.tree import Layout, Tree

Floats = npt.NDArray[np.float64]
AFTER = "personal_"  # of what was measured after local training
OF_ONE = "value/"  # of a metric of which its value alone is sent


@dataclass(frozen=True)
class ClientMeasure:
    """The metrics of clients, and what they send of them.

    Attributes:
        measure: The metrics.
    """

    measure: Measure

    @classmethod
    def of(cls, task: Task) -> ClientMeasure:
        """Take what a task is measured by."""
        return cls(Measure.of_task(task))

    @property
    def _scored(self) -> list[str]:
        return [n for n, metric in self.measure.metrics.items() if not metric.count.sums]

    def sent(
        self, task: Task, weights: Tree, samples: Samples, counts: torch.Tensor, batch_size: int
    ) -> Tree:
        """Measure the same weights on samples of several clients, in batches of all of them.

        Args:
            task: Has the model.
            weights: Parameters by name.
            samples: Of one client after another.
            counts: How many of each, int64 [K].
            batch_size: Samples of a forward pass.

        Returns:
            What clients send, float64 [K, q] by name.
        """
        count = len(counts)
        whose = Owners(count, torch.arange(count).repeat_interleave(counts))
        state = state_of(task.model, weights, samples, self.measure, batch_size, whose)
        sums = {n: t.cpu() for n, t in state.items() if "/" not in n}
        each = self.measure.values(state, count) if self._scored else []
        values = {n: torch.tensor([v[n] for v in each]).double()[:, None] for n in self._scored}
        return sums | {OF_ONE + name: value for name, value in values.items()}

    def names(self, when: Iterable[str]) -> list[str]:
        """Name what a client sends that measures at these points of a round."""
        sums = [count.name for count in self.measure.counts if count.sums]
        own = [*sums, *(OF_ONE + name for name in self._scored)]
        return [point + name for point in when for name in own]

    def values(self, sent: Tree, when: str) -> tuple[dict[str, Floats], dict[str, float]]:
        """Compute the metrics of each client, and of all samples together.

        Args:
            sent: What clients sent, [K, q] by name.
            when: What is before the names of that which was measured at a point of a round.

        Returns:
            By metric, of the clients in their order [K], and of all; NaN where it has no value.
        """
        own = {n.removeprefix(when): t for n, t in sent.items()}
        state = {count.name: own[count.name] for count in self.measure.counts if count.sums}
        each = self.measure.values(state, len(next(iter(sent.values()))))
        whole = self.measure.values(self.measure.pooled(state))[0]
        found = {n: np.array([v[n] for v in each], np.float64) for n in self.measure.metrics}
        return found | {n: own[OF_ONE + n][:, 0].numpy() for n in self._scored}, whole


def usual(layouts: Sequence[Layout]) -> Layout:
    """Find the layout that most clients have sent, the first of equals."""
    return Counter(layouts).most_common(1)[0][0]


def spread(
    metric: str, values: Floats, pooled: float, lower: Collection[str] = ()
) -> dict[str, float]:
    """Describe a metric over clients.

    Args:
        metric: Its name, which has the direction.
        values: Of each client [K]; a client whose metric is not defined (NaN) is left out.
        pooled: Of all samples together; NaN: it is not known.
        lower: As for `higher_is_better`.

    Returns:
        ``mean`` and ``std`` over clients, which count alike (``std`` as of a whole population);
        ``pooled``; percentiles between the nearest values; ``worst10`` and ``best10``, the means
        over the worst and the best tenth, of ceil(K / 10) clients. NaN of no client.

    Example:
        >>> found = spread("accuracy", np.array([0.2, 0.4, 0.9]), 0.6)
        >>> found["worst10"], found["best10"], round(found["mean"], 3), found["median"]
        (0.2, 0.9, 0.5, 0.4)
    """
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        known = np.array([math.nan])
    tenth = math.ceil(len(known) / 10)
    low, high = float(known[:tenth].mean()), float(known[-tenth:].mean())
    worst, best = (low, high) if higher_is_better(metric, lower) else (high, low)
    p10, median, p90 = map(float, np.quantile(known, [0.1, 0.5, 0.9]))
    return {
        "mean": float(known.mean()),
        "pooled": pooled,
        "std": float(known.std()),
        "min": float(known[0]),
        "p10": p10,
        "median": median,
        "p90": p90,
        "max": float(known[-1]),
        "worst10": worst,
        "best10": best,
    }
