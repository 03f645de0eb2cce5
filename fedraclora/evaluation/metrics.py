"""The table of metrics, and the state they are made of, which adds up over batches and clients.

A metric is the value of a *count*. Where sums over the samples are enough, these are all that is
kept, for each owner of samples [owners, q]; else every output and target is, with its owner. One
pass over samples of many clients gives the states of all, and `Measure.pooled` that of them
together. Metrics of one count share it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from fedraclora.data.task import IGNORED_TOKEN, LOSSES, loss_function
from fedraclora.errors import ConfigError, unknown
from fedraclora.tree import Tree

_CLASSES = frozenset({"cross_entropy", "logistic", "next_token", "token_classes", "pixel_classes"})
_LABELS = frozenset({"multi_label"})
_NUMBERS = frozenset({"squared_error", "logistic"})


@dataclass(frozen=True)
class Owners:
    """Whose the rows of a batch are.

    Attributes:
        count: Number of owners.
        of: The owner of each row, 0 to ``count - 1``, int64 [N]; None: all are of the only one.
    """

    count: int = 1
    of: torch.Tensor | None = None

    def sums(self, *columns: torch.Tensor) -> torch.Tensor:
        """Add columns [N] up for each owner: float64 [count, columns], in the order of the rows."""
        if self.of is None:
            return torch.stack([column.double().sum() for column in columns])[None]
        # Sorted and in segments: scattered sums have no order on a GPU, nor the same bits twice.
        rows = torch.stack([column.double() for column in columns], dim=1)
        sizes = self.of.bincount(minlength=self.count)
        return torch.segment_reduce(rows[self.of.argsort(stable=True)], "sum", lengths=sizes)

    def counts(self, places: torch.Tensor, counted: torch.Tensor, width: int) -> torch.Tensor:
        """Count how often each place, int64 [N], occurs among what is counted: [count, width]."""
        start = 0 if self.of is None else self.of * width
        table = torch.zeros(self.count * width, dtype=torch.int64, device=places.device)
        table.index_add_(0, (start + places) * counted, counted.long())
        return table.reshape(self.count, width).double()

    def repeated(self, of_row: torch.Tensor) -> Owners:
        """Give the owners of parts (tokens, pixels): ``of_row`` says of which row each part is."""
        return self if self.of is None else replace(self, of=self.of[of_row])


ONE = Owners()
# (loss, output, target, owners) -> sums [owners, q], or outputs and targets that are kept [P, ...]
Take = Callable[[str, torch.Tensor, torch.Tensor, Owners], Any]


def _losses(loss: str, output: torch.Tensor, target: torch.Tensor, owners: Owners) -> torch.Tensor:
    return owners.sums(*loss_function(loss)(output, target))


def _correct(loss: str, output: torch.Tensor, target: torch.Tensor, owners: Owners) -> torch.Tensor:
    predicted, wanted, _ = _predict(loss, output, target)
    counted = wanted != IGNORED_TOKEN
    right = (predicted == wanted) & counted
    return _of_parts(owners, target, len(wanted)).sums(right, counted)


def _classes(loss: str, output: torch.Tensor, target: torch.Tensor, owners: Owners) -> torch.Tensor:
    """Count right predictions, predictions and occurrences of each class: [owners, 3 C]."""
    predicted, wanted, width = _predict(loss, output, target)
    counted, parts = wanted != IGNORED_TOKEN, _of_parts(owners, target, len(wanted))
    right = counted & (predicted == wanted)
    pairs = ((wanted, right), (predicted, counted), (wanted, counted))
    return torch.cat([parts.counts(place, kept, width) for place, kept in pairs], dim=1)


def _labels(_: str, output: torch.Tensor, target: torch.Tensor, owners: Owners) -> torch.Tensor:
    """Count the same of each output that says yes or no, where yes is counted: [owners, 3 C]."""
    said, wanted = output.reshape(target.shape) > 0, target == 1
    return owners.sums(*torch.cat([said & wanted, said, wanted], dim=1).unbind(dim=1))


def _numbers(
    loss: str, output: torch.Tensor, target: torch.Tensor, _: Owners
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give predicted numbers and true numbers, [N], of ``multi_label`` [N, C]; float64."""
    if loss == "multi_label":
        return output.reshape(target.shape).double(), target.double()
    if not output.numel() == target.numel() == target.shape[0]:
        raise ConfigError(
            f"the metric needs one number per sample; the output is {tuple(output.shape)} "
            f"and the target {tuple(target.shape)}"
        )
    return output.reshape(-1).double(), target.reshape(-1).double()


def _predict(
    loss: str, output: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Predicted classes [P], true classes [P] (`IGNORED_TOKEN`: none), number of classes."""
    if loss == "logistic":
        return (output.reshape(-1) > 0).long(), target.reshape(-1).long(), 2
    over = 1 if loss == "pixel_classes" else -1
    predicted = output.argmax(dim=over)
    if loss == "next_token":
        predicted, target = predicted[:, :-1], target[:, 1:]
    return predicted.flatten(), target.flatten(), output.shape[over]


def _of_parts(owners: Owners, target: torch.Tensor, parts: int) -> Owners:
    """Give the owners of parts, equally many of each row."""
    rows = torch.arange(len(target), device=target.device)
    return owners.repeated(rows.repeat_interleave(parts // max(1, len(target))))


@dataclass(frozen=True)
class Count:
    """What metrics are made of.

    Attributes:
        name: Under which a state has it.
        take: Takes it from a batch.
        sums: Whether it is sums, which add up and are all that must be known of the samples (under
            secure sums nothing else can go); else all outputs and targets are kept.
    """

    name: str
    take: Take
    sums: bool = True


LOSS, CORRECT = Count("loss", _losses), Count("correct", _correct)
OF_CLASSES, OF_LABELS = Count("classes", _classes), Count("labels", _labels)
NUMBERS = Count("numbers", _numbers, sums=False)


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Attributes:
        value: Of sums [q], or of outputs and targets that were kept; both in memory.
        losses: Losses (keys of `fedraclora.data.task.LOSSES`) whose outputs the metric can read.
        count: What it is made of.
        higher_is_better: Direction, for "reached the target".
    """

    value: Callable[..., float]
    losses: frozenset[str]
    count: Count
    higher_is_better: bool = True


@dataclass(frozen=True)
class Measure:
    """The metrics of a run, and their state.

    A state is named tensors: of a `Count` that is sums one of its name, float64 [owners, q]; of
    another ``name/output``, ``name/target`` [P, ...] and ``name/owner`` [P].

    Attributes:
        metrics: By name, the headline first.
        loss: A key of `fedraclora.data.task.LOSSES`, or ``package.module:function``.

    Example:
        >>> measure = Measure.of(("accuracy", "loss"), "cross_entropy")
        >>> output, target = torch.eye(4)[:, :2], torch.tensor([0, 1, 1, 0])
        >>> two = Owners(2, torch.tensor([0, 0, 0, 1]))  # three samples and one
        >>> state = measure.join([measure.take(output, target, two)])  # of one batch, or of many
        >>> [round(each["accuracy"], 2) for each in measure.values(state, 2)]
        [0.67, 1.0]
        >>> round(measure.values(measure.pooled(state))[0]["accuracy"], 2), measure.sums
        (0.75, True)
    """

    metrics: Mapping[str, Metric]
    loss: str

    @classmethod
    def of(cls, names: Iterable[str], loss: str) -> Measure:
        """Look metrics up.

        Raises:
            ConfigError: If a metric or the loss does not exist, or do not go together.
        """
        loss_function(loss)
        chosen = {}
        for name in names:
            if name not in METRICS:
                raise unknown("metric", name, METRICS)
            if ":" not in loss and loss not in METRICS[name].losses:  # of others we know nothing
                fitting = ", ".join(sorted(k for k, m in METRICS.items() if loss in m.losses))
                raise ConfigError(
                    f"metric {name!r} cannot be computed from the outputs of a model with loss "
                    f"{loss!r}; there are: {fitting}"
                )
            chosen[name] = METRICS[name]
        return cls(chosen, loss)

    @property
    def counts(self) -> list[Count]:
        """What the metrics are made of, each once."""
        return [*{metric.count.name: metric.count for metric in self.metrics.values()}.values()]

    @property
    def sums(self) -> bool:
        """Whether sums are enough for all metrics."""
        return all(count.sums for count in self.counts)

    def summed(self) -> Measure:
        """Keep the metrics for which sums are enough."""
        return replace(self, metrics={n: m for n, m in self.metrics.items() if m.count.sums})

    def take(
        self,
        output: torch.Tensor,
        target: torch.Tensor,
        owners: Owners = ONE,
        loss: str | None = None,
    ) -> Tree:
        """Take the state of a batch.

        Args:
            output: Of the model.
            target: Of the samples.
            owners: Whose they are.
            loss: What output and target are for, where it is another one than that of the run.
        """
        state: Tree = {}
        for count in self.counts:
            found = count.take(loss or self.loss, output, target, owners)
            if count.sums:
                state[count.name] = found
                continue
            of = owners.of
            kept = target.new_zeros(len(found[1]), dtype=torch.int64) if of is None else of
            state |= zip(_kept(count), (*found, kept), strict=True)
        return state

    def join(self, states: Iterable[Tree]) -> Tree:
        """Add up the states of batches, or of the same owners elsewhere; of none it is empty."""
        by_name: dict[str, list[torch.Tensor]] = {}
        for name, part in (pair for state in states for pair in state.items()):
            by_name.setdefault(name, []).append(part)
        return {
            name: torch.cat(parts) if "/" in name else reduce(torch.add, parts)
            for name, parts in by_name.items()
        }

    def pooled(self, state: Tree) -> Tree:
        """Make the samples of all owners those of one."""
        pooled = {n: t if "/" in n else t.sum(dim=0, keepdim=True) for n, t in state.items()}
        return pooled | {n: torch.zeros_like(t) for n, t in state.items() if n.endswith("/owner")}

    def values(self, state: Tree, owners: int = 1) -> list[dict[str, float]]:
        """Compute the metrics of each owner; NaN where nothing was counted."""
        here = {name: tensor.cpu() for name, tensor in state.items()}
        return [
            {name: self._value(metric, here, owner) for name, metric in self.metrics.items()}
            for owner in range(owners)
        ]

    def _value(self, metric: Metric, state: Tree, owner: int) -> float:
        if metric.count.sums:
            found = state.get(metric.count.name)
            return math.nan if found is None else float(metric.value(found[owner].numpy()))
        kept = [state.get(name) for name in _kept(metric.count)]
        if kept[2] is None or not len(rows := (kept[2] == owner).nonzero().flatten()):
            return math.nan
        pair = [t if len(rows) == len(t) else t[rows] for t in kept[:2] if t is not None]
        return float(metric.value(*pair))


def _kept(count: Count) -> tuple[str, str, str]:
    return f"{count.name}/output", f"{count.name}/target", f"{count.name}/owner"


Sums = np.ndarray[Any, np.dtype[np.float64]]


def _ratio(sums: Sums) -> float:
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def _perplexity(sums: Sums) -> float:
    try:
        return math.exp(_ratio(sums))
    except OverflowError:
        return math.inf


def _matthews(sums: Sums) -> float:
    right, said, wanted = sums.reshape(3, -1)
    total, hits = wanted.sum(), right.sum()
    if not total:
        return math.nan
    spread = (total**2 - said @ said) * (total**2 - wanted @ wanted)
    return float((hits * total - said @ wanted) / math.sqrt(spread)) if spread else 0.0


def _f1(sums: Sums, *, average: str) -> float:
    """F1 of class 1 of two, the mean over classes that occur or were said, or of all together."""
    right, said, wanted = sums.reshape(3, -1)
    if average == "micro":
        right, said, wanted = (side.sum(keepdims=True) for side in (right, said, wanted))
    each = 2 * right / np.maximum(said + wanted, 1)
    if average != "classes":
        return float(each.mean())
    if not wanted.any():
        return math.nan
    return float(each[1] if len(each) == 2 else each[said + wanted > 0].mean())


def _mean_iou(sums: Sums) -> float:
    """Intersection over union: the mean over the classes that occur or were predicted."""
    right, said, wanted = sums.reshape(3, -1)
    union = said + wanted - right
    return float(np.mean(right[union > 0] / union[union > 0])) if union.any() else math.nan


def _auc(output: torch.Tensor, target: torch.Tensor) -> float:
    """Area under the ROC curve: the mean over the outputs of which both classes occur."""
    from sklearn.metrics import roc_auc_score

    scores, truth = (side.reshape(len(side), -1).numpy() for side in (output, target))
    both = [k for k in range(truth.shape[1]) if np.unique(truth[:, k]).size == 2]
    if not both or not np.isfinite(scores).all():
        return math.nan
    return float(np.mean([roc_auc_score(truth[:, k], scores[:, k]) for k in both]))


def _correlation(output: torch.Tensor, target: torch.Tensor, *, name: str) -> float:
    from scipy import stats

    scores, truth = output.numpy(), target.numpy()
    # A constant or a non-finite side has no correlation; scipy says so with a warning.
    for side in (scores, truth):
        if side.size < 2 or not np.isfinite(side).all() or np.ptp(side) == 0.0:
            return math.nan
    return float(getattr(stats, name)(scores, truth).statistic)


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_ratio, _CLASSES, CORRECT),
    "token_accuracy": Metric(_ratio, frozenset({"next_token", "token_classes"}), CORRECT),
    "loss": Metric(_ratio, frozenset(LOSSES), LOSS, higher_is_better=False),
    "perplexity": Metric(
        _perplexity, frozenset({"next_token", "cross_entropy"}), LOSS, higher_is_better=False
    ),
    "matthews": Metric(_matthews, _CLASSES, OF_CLASSES),
    "f1": Metric(partial(_f1, average="classes"), _CLASSES, OF_CLASSES),
    "f1_micro": Metric(partial(_f1, average="micro"), _LABELS, OF_LABELS),
    "f1_macro": Metric(partial(_f1, average="macro"), _LABELS, OF_LABELS),
    "auc": Metric(_auc, _LABELS | {"logistic"}, NUMBERS),
    "mean_iou": Metric(_mean_iou, frozenset({"pixel_classes"}), OF_CLASSES),
    "pearson": Metric(partial(_correlation, name="pearsonr"), _NUMBERS, NUMBERS),
    "spearman": Metric(partial(_correlation, name="spearmanr"), _NUMBERS, NUMBERS),
}


def higher_is_better(metric: str) -> bool:
    """Return the direction of a metric; names outside `METRICS` are taken as scores.

    Example:
        >>> [higher_is_better(f"clients.{name}") for name in ("f1.worst10", "loss.mean", "f1.std")]
        [True, False, False]
    """
    if metric.startswith("clients."):  # of one of clients: by what describes it over them
        metric, _, told = metric.removeprefix("clients.").rpartition(".")
        if told == "std":
            return False
    metric = metric.removeprefix("personal_")
    return METRICS[metric].higher_is_better if metric in METRICS else True
