"""Handle labels: names of classes, targets, and the data set of labelled samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch

from fedraclora.data.dataset import Column, DataSet, RowNumbers
from fedraclora.data.encoders.array import found_shape, outputs_for
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import OneOf

OBJECTIVES = {  # the loss of each task, and its metrics
    "classification": ("cross_entropy", ("accuracy", "loss")),
    "regression": ("squared_error", ("pearson", "spearman", "loss")),
}
TaskName = Annotated[str, OneOf(OBJECTIVES)]
# For arrays also the losses with many targets per sample, by name.
OF_ARRAYS = {name: (name, LOSSES[name].metrics) for name in ("multi_label", "pixel_classes")}
ArrayTask = Annotated[str, OneOf((*OBJECTIVES, *OF_ARRAYS))]


def class_names(labels: Sequence[str], values: Sequence[str] | None = None) -> list[str]:
    """Return the class names in order: the given ones, else sorted (integers by size).

    Raises:
        ConfigError: If a given name does not occur.

    Example:
        >>> class_names(["10", "9", "9"]), class_names(["no", "yes", "Yes"])
        (['9', '10'], ['Yes', 'no', 'yes'])
    """
    found = set(labels)
    if values is not None:
        names = [str(value) for value in values]
        missing = sorted(set(names) - found)
        if missing or len(set(names)) < len(names):
            raise ConfigError(
                f"data.values={names}: the labels {missing} do not occur in the data, or one is "
                "named twice"
            )
        return names
    numeric = all(name.removeprefix("-").isdigit() for name in found)
    return sorted(found, key=int) if numeric else sorted(found)


def as_values(names: Sequence[str], values: object = None) -> list[Any]:
    """Return classes with the type of their column: integers, booleans or texts.

    Args:
        names: Names of the classes, in order.
        values: Values of the column; None: a file of texts, where integers count as integers.

    Example:
        >>> as_values(["3", "10"]), as_values(["3", "10"], ["10", "3"]), as_values(["03", "10"])
        ([3, 10], ['3', '10'], ['03', '10'])
    """
    kind = "i" if values is None else np.asarray(values).dtype.kind
    if kind == "b":
        return [name == "True" for name in names]
    whole = all(n.removeprefix("-").isdecimal() and str(int(n)) == n for n in names)
    return [int(name) for name in names] if whole and kind in "iuf" else [*names]


def found_classes(
    labels: Sequence[str],
    label: str,
    task: str,
    source: object,
    values: Sequence[str] | None = None,
) -> list[str]:
    """Return the classes of a column of labels; empty for a regression.

    Args:
        labels: The label of each row.
        label: The column, for messages.
        task: A key of `OBJECTIVES`.
        source: The file, for messages.
        values: See `class_names`.

    Raises:
        ConfigError: If the labels look like numbers to predict, or are all the same.
    """
    if task != "classification":
        return []
    names = class_names(labels, values)
    if any("." in name and name.replace(".", "", 1).lstrip("-").isdigit() for name in names):
        raise ConfigError(
            f"data.label={label}: the values ({', '.join(names[:3])}, ...) are fractions, not "
            "classes. To predict a number set data.task=regression."
        )
    whole = all(name.lstrip("-").isdigit() for name in names)
    if whole and len(names) > max(100, len(labels) / 10):
        raise ConfigError(
            f"data.label={label}: {len(names)} different whole numbers in {len(labels)} rows do "
            "not look like classes. To predict a number set data.task=regression; write classes "
            "as words."
        )
    if len(names) < 2:
        raise ConfigError(f"data.label={label}: {source} has only the value {names}")
    return names


def target_of(
    labels: Sequence[str],
    names: Sequence[str],
    where: object = "test",
    rows: RowNumbers | None = None,
) -> torch.Tensor:
    """Convert labels to class indices, or to scores.

    Args:
        labels: The label of each row.
        names: Names of the classes, in order; none for numbers.
        where: The source of the labels, for messages.
        rows: Their row numbers in it, from 0; None: all.

    Returns:
        int64 [N] (classes), or float32 [N] (scores).

    Raises:
        DataError: If a label is not one of the classes, or a score is not finite.
    """
    if not names:
        scores = np.zeros(len(labels), dtype=np.float32)
        for row, label in enumerate(labels):
            try:
                with np.errstate(over="ignore"):
                    scores[row] = np.float32(label)
            except ValueError as error:
                raise DataError(
                    f"data.label: {label!r} is not a number, but data.task=regression predicts "
                    "numbers: set data.task=classification, or correct these rows"
                ) from error
        if not np.isfinite(scores).all():
            raise DataError(
                "data.label: a value is NaN, infinite or too large for float32. Correct it, or "
                "leave its row out."
            )
        return torch.from_numpy(scores)
    number = {name: index for index, name in enumerate(names)}
    strange = sorted(set(labels) - set(number))
    if strange:
        place = next(row for row, name in enumerate(labels) if name in strange)
        raise DataError(
            f"{where}: labels {strange} do not occur in the training rows {[*names]}; the first of "
            f"them is in row {(place if rows is None else rows[place]) + 1}"
        )
    return torch.tensor([number[name] for name in labels], dtype=torch.int64)


def supervised(
    train: Samples,
    test: Samples,
    names: Sequence[str],
    task: str,
    *,
    metrics: Sequence[str] | None,
    owners: Column | None,
    client: str = "client",
    info: dict[str, object],
    reading: dict[str, object],
    **more: Any,
) -> DataSet:
    """Build a data set of samples with class labels or numbers to predict.

    Args:
        train: Training samples.
        test: Held-out samples.
        names: Names of the classes, in order; none for numbers.
        task: A key of `OBJECTIVES` or `OF_ARRAYS`.
        metrics: Names of metrics, the primary one first; None: those usual for the task.
        owners: The client of each training row, or None.
        client: The name of that column in the table.
        info: Facts for the summary.
        reading: See `DataSet`; missing classes are added, as `as_values` returns those of a file.
        **more: Other fields of `DataSet`.
    """
    loss, usual = (OBJECTIVES | OF_ARRAYS)[task]
    usual = ("loss",) if task == "regression" and train.target.dim() > 1 else usual
    named: dict[str, object] = {"classes": [*names]} if names else {}
    columns = {} if owners is None else dict.fromkeys((client, "client"), owners)
    return DataSet(
        train=train,
        test=test,
        classes=len(names) or outputs_for([train, test], loss) or 1,
        loss=loss,
        metrics=tuple(metrics or usual),
        columns=columns | ({"label": train.target.numpy()} if names else {}),
        sample_shape=found_shape(train),
        info=info | named,
        reading=({"classes": as_values(names)} if names else {}) | reading,
        **more,
    )
