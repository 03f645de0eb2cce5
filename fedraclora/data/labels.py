"""Labels as they are written in a table, and the classes or scores that they become."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.errors import ConfigError, DataError

METRICS = {"classification": ("accuracy", "loss"), "regression": ("pearson", "spearman", "loss")}
LOSSES = {"classification": "cross_entropy", "regression": "squared_error"}


def class_names(labels: Sequence[str], values: Sequence[str] | None = None) -> list[str]:
    """Name the classes in their order: as asked for, else sorted (whole numbers by size).

    Raises:
        ConfigError: If what is asked for does not occur.

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
                f"data.values={names}: want different labels that occur; {missing} do not"
            )
        return names
    numeric = all(name.removeprefix("-").isdigit() for name in found)
    return sorted(found, key=int) if numeric else sorted(found)


def target_of(labels: Sequence[str], names: Sequence[str], task: str) -> torch.Tensor:
    """Turn labels into classes by their place in ``names``, or into scores.

    Args:
        labels: Of each row.
        names: Of the classes, in their order.
        task: A key of `METRICS`.

    Returns:
        int64 [N] (classes), or float32 [N] (scores).

    Raises:
        DataError: If a label is none of the classes, or a score no finite number.
    """
    if task == "regression":
        try:
            scores: npt.NDArray[np.float32] = np.array(labels, dtype=np.float32)
        except ValueError as error:
            raise DataError(f"data.label: a score is not a number: {error}") from error
        if not np.isfinite(scores).all():
            raise DataError("data.label: a score is not finite")
        return torch.from_numpy(scores)
    number = {name: index for index, name in enumerate(names)}
    strange = sorted(set(labels) - set(number))
    if strange:
        raise DataError(f"test labels {strange} do not occur in the training rows {[*names]}")
    return torch.tensor([number[name] for name in labels], dtype=torch.int64)
