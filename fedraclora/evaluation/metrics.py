"""Define the table of metrics, and their state, which adds up over batches and clients.

A metric is computed from a *count*. If sums over samples are enough, only these are kept, for each
owner of samples [owners, q]; otherwise every output and target is kept, with its owner. One pass
over the samples of many clients gives the states of all, and `Measure.pooled` their joint state.
Metrics with the same count share it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from fedraclora.data.own_loss import is_own, short_name
from fedraclora.data.task import CHOICE_METRICS, LOSSES, LossFunction, Task, loss_function
from fedraclora.errors import ConfigError, unknown
from fedraclora.evaluation.counts import (
    CORRECT,
    LOSS,
    NUMBERS,
    OF_CLASSES,
    OF_LABELS,
    ONE,
    Batch,
    Formula,
    MetricInput,
    RowOwners,
    ratio,
)
from fedraclora.evaluation.own_metrics import own_metric
from fedraclora.limits import COLUMNS
from fedraclora.tree import Tree

__all__ = ["METRICS", "OF_CLASSES", "ONE", "Measure", "RowOwners", "higher_is_better", "lower_of"]
_CLASSES = frozenset({"cross_entropy", "logistic", "next_token", "token_classes", "pixel_classes"})
_LABELS = frozenset({"multi_label"})
_NUMBERS = frozenset({"squared_error", "logistic"})


@dataclass(frozen=True)
class Measure:
    """Compute the metrics of a run from states that add up.

    A state is a dict of tensors: for a `MetricInput` of sums, one of its name, float64
    [owners, q]; for another, ``name/output``, ``name/target`` [P, ...] and ``name/owner`` [P].

    Attributes:
        metrics: By name, the primary metric first.
        loss: The loss to compute.
        reads: The loss that defines how outputs are read.

    Example:
        >>> measure = Measure.of(("accuracy", "loss"), "cross_entropy")
        >>> output, target = torch.eye(4)[:, :2], torch.tensor([0, 1, 1, 0])
        >>> two = RowOwners(2, torch.tensor([0, 0, 0, 1]))  # three samples and one
        >>> state = measure.join([measure.take(output, target, two)])  # of one batch, or of many
        >>> [round(each["accuracy"], 2) for each in measure.values(state, 2)]
        [0.67, 1.0]
        >>> round(measure.values(measure.pooled(state))[0]["accuracy"], 2)
        0.75
    """

    metrics: Mapping[str, Formula]
    loss: LossFunction
    reads: str

    @classmethod
    def of(cls, names: Iterable[str], loss: str, like: str = "") -> Measure:
        """Create it from the names of metrics.

        Args:
            names: Keys of `METRICS`, or names of metrics of the user's own.
            loss: A key of `fedraclora.data.task.LOSSES`, or the name of one of the user's own.
            like: The loss that defines how outputs are read, if not ``loss``.

        Raises:
            ConfigError: If a metric or the loss does not exist, or the two are incompatible.
        """
        function, reads = loss_function(loss), like or loss
        chosen: dict[str, Formula] = {}
        for name in names:
            if is_own(name) and (short := short_name(name)) in {*METRICS, *chosen, *COLUMNS}:
                other = "a column of every ledger" if short in COLUMNS else "another metric"
                raise ConfigError(
                    f"data.metrics has {name}, but {short} is the name of {other}: give it a name "
                    "of its own (fedraclora.Metric(..., name=...))"
                )
            if is_own(name):
                chosen[short_name(name)] = own_metric(name)
                continue
            if name not in METRICS:
                raise unknown("metric", name, METRICS)
            # nothing is known about other losses
            if reads in LOSSES and reads not in METRICS[name].losses:
                fitting = ", ".join(sorted(k for k, m in METRICS.items() if reads in m.losses))
                raise ConfigError(
                    f"metric {name!r} cannot be computed from the outputs of a model with loss "
                    f"{reads!r}; there are: {fitting}"
                )
            chosen[name] = METRICS[name]
        return cls(chosen, function, reads)

    @property
    def counts(self) -> list[MetricInput]:
        """List the inputs of the metrics, without repetition."""
        return [*{metric.count.name: metric.count for metric in self.metrics.values()}.values()]

    @classmethod
    def of_task(cls, task: Task) -> Measure:
        """Create it from the metrics of a task."""
        return cls.of(task.metrics, task.loss, task.like)

    @property
    def lower(self) -> list[str]:
        """List the user's own metrics for which lower is better."""
        return [n for n, m in self.metrics.items() if n not in METRICS and not m.higher_is_better]

    def take(
        self, output: torch.Tensor, target: torch.Tensor, owners: RowOwners = ONE, loss: str = ""
    ) -> Tree:
        """Compute the state of a batch.

        Args:
            output: Of the model.
            target: Of the samples.
            owners: The owners of the samples.
            loss: The key of `LOSSES` that output and target belong to, if another one.
        """
        judge, reads = (LOSSES[loss], loss) if loss else (self.loss, self.reads)
        batch, state = Batch(output, target, judge, reads, owners), {}
        for count in self.counts:
            if count.sums:
                state[count.name] = count.take(batch)
                continue
            *pair, whose = count.take(batch)
            one = target.new_zeros(len(pair[0]), dtype=torch.int64)
            state |= zip(_kept(count), (*pair, one if whose.of is None else whose.of), strict=True)
        return state

    def join(self, states: Iterable[Tree]) -> Tree:
        """Add the states of batches, or of the same owners elsewhere; the sum of none is empty."""
        by_name: dict[str, list[torch.Tensor]] = {}
        for name, part in (pair for state in states for pair in state.items()):
            by_name.setdefault(name, []).append(part)
        return {
            name: torch.cat(parts) if "/" in name else reduce(torch.add, parts)
            for name, parts in by_name.items()
        }

    def pooled(self, state: Tree) -> Tree:
        """Treat the samples of all owners as those of one."""
        pooled = {n: t if "/" in n else t.sum(dim=0, keepdim=True) for n, t in state.items()}
        return pooled | {n: torch.zeros_like(t) for n, t in state.items() if n.endswith("/owner")}

    def values(self, state: Tree, owners: int = 1) -> list[dict[str, float]]:
        """Compute the metrics of each owner; NaN if nothing was counted."""
        here = {name: tensor.cpu() for name, tensor in state.items()}
        return [
            {name: self._value(metric, here, owner) for name, metric in self.metrics.items()}
            for owner in range(owners)
        ]

    def _value(self, metric: Formula, state: Tree, owner: int) -> float:
        if metric.count.sums:
            found = state.get(metric.count.name)
            return math.nan if found is None else float(metric.value(found[owner].numpy()))
        kept = [state.get(name) for name in _kept(metric.count)]
        if kept[2] is None or not len(rows := (kept[2] == owner).nonzero().flatten()):
            return math.nan
        pair = [t if len(rows) == len(t) else t[rows] for t in kept[:2] if t is not None]
        return float(metric.value(*pair))


def _kept(count: MetricInput) -> tuple[str, str, str]:
    return f"{count.name}/output", f"{count.name}/target", f"{count.name}/owner"


Sums = np.ndarray[Any, np.dtype[np.float64]]


def _perplexity(sums: Sums) -> float:
    try:
        return math.exp(ratio(sums))
    except OverflowError:
        return math.inf


def _matthews(sums: Sums) -> float:
    right, predicted, wanted = sums.reshape(3, -1)
    total, hits = wanted.sum(), right.sum()
    if not total:
        return math.nan
    spread = (total**2 - predicted @ predicted) * (total**2 - wanted @ wanted)
    return float((hits * total - predicted @ wanted) / math.sqrt(spread)) if spread else 0.0


def _f1(sums: Sums, *, average: str) -> float:
    """Compute F1 of class 1 of two, the mean over classes, or F1 of all outputs together."""
    right, predicted, wanted = sums.reshape(3, -1)
    if average == "micro":
        right, predicted, wanted = (side.sum(keepdims=True) for side in (right, predicted, wanted))
    each = 2 * right / np.maximum(predicted + wanted, 1)
    if average != "classes":
        return float(each.mean())
    if not wanted.any():
        return math.nan
    return float(each[1] if len(each) == 2 else each[predicted + wanted > 0].mean())


def _mean_iou(sums: Sums) -> float:
    """Compute the mean intersection over union of the classes that occur or were predicted."""
    right, predicted, wanted = sums.reshape(3, -1)
    union = predicted + wanted - right
    return float(np.mean(right[union > 0] / union[union > 0])) if union.any() else math.nan


def _auc(output: torch.Tensor, target: torch.Tensor) -> float:
    """Compute the area under the ROC curve, averaged over outputs with both classes."""
    from sklearn.metrics import roc_auc_score

    scores, truth = (side.reshape(len(side), -1).numpy() for side in (output, target))
    both = [k for k in range(truth.shape[1]) if np.unique(truth[:, k]).size == 2]
    if not both or not np.isfinite(scores).all():
        return math.nan
    return float(np.mean([roc_auc_score(truth[:, k], scores[:, k]) for k in both]))


def _correlation(output: torch.Tensor, target: torch.Tensor, *, name: str) -> float:
    from scipy import stats

    scores, truth = output.numpy(), target.numpy()
    # A constant or non-finite side has no correlation; scipy only warns.
    for side in (scores, truth):
        if side.size < 2 or not np.isfinite(side).all() or np.ptp(side) == 0.0:
            return math.nan
    return float(getattr(stats, name)(scores, truth).statistic)


METRICS: dict[str, Formula] = {
    "accuracy": Formula(ratio, _CLASSES, CORRECT),
    "token_accuracy": Formula(ratio, frozenset({"next_token", "token_classes"}), CORRECT),
    "loss": Formula(ratio, frozenset(LOSSES), LOSS, higher_is_better=False),
    "perplexity": Formula(
        _perplexity, frozenset({"next_token", "cross_entropy"}), LOSS, higher_is_better=False
    ),
    "matthews": Formula(_matthews, _CLASSES, OF_CLASSES),
    "f1": Formula(partial(_f1, average="classes"), _CLASSES, OF_CLASSES),
    "f1_micro": Formula(partial(_f1, average="micro"), _LABELS, OF_LABELS),
    "f1_macro": Formula(partial(_f1, average="macro"), _LABELS, OF_LABELS),
    "auc": Formula(_auc, _LABELS | {"logistic"}, NUMBERS),
    "mean_iou": Formula(_mean_iou, frozenset({"pixel_classes"}), OF_CLASSES),
    "pearson": Formula(partial(_correlation, name="pearsonr"), _NUMBERS, NUMBERS),
    "spearman": Formula(partial(_correlation, name="spearmanr"), _NUMBERS, NUMBERS),
}
PERSONAL = "personal_"  # of clients' own models, on the samples of the server
AFTER = "finetuned_"  # of what clients measured after local training
MEASURED = (*METRICS, "gap", *(f"{PERSONAL}{name}" for name in METRICS), *CHOICE_METRICS)


def lower_of(facts: object) -> list[str]:
    """List the metrics for which lower is better, from a task's facts in a summary."""
    found = facts.get("lower_is_better") if isinstance(facts, Mapping) else None
    return [*map(str, found)] if isinstance(found, list) else []


def higher_is_better(metric: str, lower: Collection[str] = ()) -> bool:
    """Return whether higher is better; metrics outside `METRICS` count as scores.

    Args:
        metric: Its name.
        lower: The user's own metrics for which lower is better (`Measure.lower`).

    Example:
        >>> [higher_is_better(f"clients.{name}") for name in ("f1.worst10", "loss.mean", "f1.std")]
        [True, False, False]
    """
    if metric.startswith("clients."):  # of one of clients: by what describes it over them
        metric, _, statistic = metric.removeprefix("clients.").rpartition(".")
        if statistic == "std":
            return False
    metric = metric.removeprefix(PERSONAL).removeprefix(AFTER)
    return METRICS[metric].higher_is_better if metric in METRICS else metric not in lower
