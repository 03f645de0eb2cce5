"""Compute the inputs of metrics: sums per owner, or outputs and targets that are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.task import LOSSES, LossFunction, read_as
from fedraclora.errors import ConfigError


@dataclass(frozen=True)
class RowOwners:
    """Map the rows of a batch to their owners.

    Attributes:
        count: Number of owners.
        of: The owner of each row, 0 to ``count - 1``, int64 [N]; None: one owner has all rows.
    """

    count: int = 1
    of: torch.Tensor | None = None

    def sums(self, *columns: torch.Tensor) -> torch.Tensor:
        """Sum columns [N] per owner: float64 [count, columns], in the order of the rows."""
        if self.of is None:
            return torch.stack([column.double().sum() for column in columns])[None]
        # Sorted and in segments: on a GPU, scattered sums have no fixed order and so no fixed bits.
        rows = torch.stack([column.double() for column in columns], dim=1)
        sizes = self.of.bincount(minlength=self.count)
        return torch.segment_reduce(rows[self.of.argsort(stable=True)], "sum", lengths=sizes)

    def counts(self, places: torch.Tensor, counted: torch.Tensor, width: int) -> torch.Tensor:
        """Count how often each index, int64 [N], occurs per owner: [count, width]."""
        start = 0 if self.of is None else self.of * width
        table = torch.zeros(self.count * width, dtype=torch.int64, device=places.device)
        table.index_add_(0, (start + places) * counted, counted.long())
        return table.reshape(self.count, width).double()

    def repeated(self, of_row: torch.Tensor) -> RowOwners:
        """Return the owners of parts (tokens, pixels): ``of_row`` maps each part to its row."""
        return self if self.of is None else replace(self, of=self.of[of_row])


ONE = RowOwners()


@dataclass(frozen=True)
class Batch:
    """Hold the outputs of a model beside the targets of the samples.

    Attributes:
        output, target: Of the samples.
        loss: The loss to compute.
        reads: The loss that defines how outputs are read (`fedraclora.data.task.Task.reads`).
        owners: The owners of the samples.
    """

    output: torch.Tensor
    target: torch.Tensor
    loss: LossFunction
    reads: str
    owners: RowOwners = ONE

    def classes(self) -> tuple[torch.Tensor, torch.Tensor, int, RowOwners]:
        """Return predicted [P] and true classes (-100: none), their number, and owners."""
        output, target = self.output, self.target
        if self.reads == "logistic":
            return (output.reshape(-1) > 0).long(), target.reshape(-1).long(), 2, self.owners
        over = 1 if self.reads == "pixel_classes" else -1
        predicted = output.argmax(dim=over)
        if self.reads == "next_token":
            predicted, target = predicted[:, :-1], target[:, 1:]
        rows = torch.arange(len(target), device=target.device)
        owners = self.owners.repeated(rows.repeat_interleave(target[:1].numel()))
        return predicted.flatten(), target.flatten(), output.shape[over], owners

    def rows(self) -> tuple[torch.Tensor, torch.Tensor, RowOwners]:
        """Return outputs and targets for the user's own metrics.

        Tokens or pixels have a row each, [P, C] beside [P], without those that have no target; one
        number per sample gives [N] on both sides.
        """
        output, target, owners = self.output, self.target, self.owners
        if read_as(self.reads).each:
            output = output.movedim(1 if self.reads == "pixel_classes" else -1, -1)
            if self.reads == "next_token":
                output, target = output[:, :-1], target[:, 1:]
            kept = target != IGNORED_TOKEN
            return output[kept], target[kept], owners.repeated(kept.nonzero()[:, 0])
        if read_as(self.reads).numbers and self.reads in LOSSES:
            shape = (len(target), *(() if target[0].numel() == 1 else target.shape[1:]))
            output, target = output.reshape(shape), target.reshape(shape)
        return output, target, owners


# A batch -> sums [owners, q]; or outputs and targets that are kept [P, ...], and whose they are
Take = Callable[[Batch], Any]


def _losses(batch: Batch) -> torch.Tensor:
    return batch.owners.sums(*batch.loss(batch.output, batch.target))


def _correct(batch: Batch) -> torch.Tensor:
    predicted, wanted, _, owners = batch.classes()
    counted = wanted != IGNORED_TOKEN
    return owners.sums((predicted == wanted) & counted, counted)


def _classes(batch: Batch) -> torch.Tensor:
    """Count right predictions, predictions and occurrences of each class: [owners, 3 C]."""
    predicted, wanted, width, owners = batch.classes()
    counted = wanted != IGNORED_TOKEN
    right = counted & (predicted == wanted)
    pairs = ((wanted, right), (predicted, counted), (wanted, counted))
    return torch.cat([owners.counts(place, kept, width) for place, kept in pairs], dim=1)


def _labels(batch: Batch) -> torch.Tensor:
    """Count the same for each yes-or-no output: [owners, 3 C]."""
    predicted, wanted = batch.output.reshape(batch.target.shape) > 0, batch.target == 1
    columns = torch.cat([predicted & wanted, predicted, wanted], dim=1)
    return batch.owners.sums(*columns.unbind(dim=1))


def _numbers(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, RowOwners]:
    """Return predicted and true numbers, [N], or [N, C] for ``multi_label``; float64."""
    output, target = batch.output, batch.target
    if batch.reads == "multi_label":
        return output.reshape(target.shape).double(), target.double(), batch.owners
    if not output.numel() == target.numel() == target.shape[0]:
        raise ConfigError(
            f"the metric needs one number per sample; the output is {tuple(output.shape)} "
            f"and the target {tuple(target.shape)}"
        )
    return output.reshape(-1).double(), target.reshape(-1).double(), batch.owners


@dataclass(frozen=True)
class MetricInput:
    """Define the input of a metric.

    Attributes:
        name: Its name in a state.
        take: Computes it from a batch.
        sums: Whether it consists of sums, which can be added (secure aggregation needs this);
            otherwise all outputs and targets are kept.
    """

    name: str
    take: Take
    sums: bool = True


def ratio(sums: Any) -> float:
    """Divide two sums; NaN if nothing was counted."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


LOSS, CORRECT = MetricInput("loss", _losses), MetricInput("correct", _correct)
OF_CLASSES, OF_LABELS = MetricInput("classes", _classes), MetricInput("labels", _labels)
NUMBERS = MetricInput("numbers", _numbers, sums=False)


@dataclass(frozen=True)
class Formula:
    """Define how a metric is computed.

    Attributes:
        value: Computes the metric from sums [q], or from kept outputs and targets, in memory.
        losses: Losses (keys of `fedraclora.data.task.LOSSES`) whose outputs the metric can read.
        count: Its input.
        higher_is_better: Direction, for "reached the target".
    """

    value: Callable[..., float]
    losses: frozenset[str]
    count: MetricInput
    higher_is_better: bool = True
