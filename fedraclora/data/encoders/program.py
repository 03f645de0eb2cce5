"""Encode data of a Python program: arrays, torch and Hugging Face datasets, pandas frames."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np
import torch

from fedraclora.data.dataset import DataSet, RowNumbers
from fedraclora.data.encoders.array import gathered, is_masked
from fedraclora.data.encoders.table import TableForm, of_frames
from fedraclora.data.objective import INPUT_IDS, judged_by
from fedraclora.data.own_loss import is_own
from fedraclora.data.samples import Samples
from fedraclora.data.tables import Table
from fedraclora.errors import ConfigError, DataError
from fedraclora.imports import as_user_error, failure_of

TARGET_NAMES = ("label", "labels", "target")  # if the caller names no column


def table_of(found: object, where: str, target: str | None = None) -> Samples:
    """Read one table.

    Raises:
        DataError: If it is no table, or holds other values than numbers.
    """
    if is_columns(found):
        return of_columns(found, where, target)
    if isinstance(found, torch.utils.data.Dataset):
        return of_dataset(found, where, target)
    if not isinstance(found, tuple | list | Samples):
        raise DataError(
            f"{where} is of type {type(found).__name__}. Give (inputs, target), a dataset of "
            "torch or Hugging Face, or a list with one of these for each client."
        )
    return gathered(found, where)


def of_dataset(found: Any, where: str, target: str | None) -> Samples:
    """Read a map-style torch dataset of pairs, or of dicts with a target."""
    try:
        count = len(found)
    except Exception as error:
        raise DataError(
            f"{where}: {type(found).__name__} has no length ({error}). Give a map-style dataset "
            "(list(...) makes one of an iterable dataset)."
        ) from error
    if not count:
        raise DataError(f"{where} holds no samples")
    rows = []
    for row in range(count):
        with as_user_error(DataError, f"{where}: ", f"reading sample {row}"):
            rows.append(found[row])
        if is_masked(rows[-1]):
            raise DataError(f"{where}: sample {row} has masked values: fill them, or leave it out")
    try:
        samples = torch.utils.data.default_collate(rows)
    except Exception as error:  # a user's type may raise anything
        raise DataError(
            f"{where}: its samples do not stack into one array ({error}). Give inputs of one "
            "shape: pad texts, resize images."
        ) from error
    if isinstance(samples, dict):
        name = found_target(samples, target)
        if name not in samples:
            raise DataError(
                f"{where}: its samples have {[*samples]}; name the target with target=..."
            )
        rest = {n: t for n, t in samples.items() if n != name}
        samples = (rest if len(rest) > 1 else next(iter(rest.values())), samples[name])
    return gathered(samples, where)


def found_target(names: Collection[str], asked_for: str | None) -> str | None:
    """Find the column to predict: the one given, else one with a usual name."""
    return asked_for or next((name for name in TARGET_NAMES if name in names), None)


def is_clients(data: object) -> TypeGuard[Mapping[Any, Any] | list[Any]]:
    """Return whether these are tables of several clients, not one table."""
    return isinstance(data, Mapping | list) and not is_columns(data)


def listed_tables(data: object) -> list[Any]:
    """List the tables of several clients, or the one table.

    Raises:
        DataError: If there is none.
    """
    if not is_clients(data):
        return [data]
    if not data:
        raise DataError("data is an empty list: give the samples of one or more clients")
    return list(data.values()) if isinstance(data, Mapping) else data


def named_classes(data: Any, target: str | None) -> dict[str, object]:
    """Return the class names of a Hugging Face ``Dataset`` (`DataSet.reading`)."""
    first = listed_tables(data)[0]
    if not is_columns(first):
        return {}
    name = found_target(first.column_names, target)
    names = getattr((first.features or {}).get(name), "names", None)
    named = [str(known) for known in names or ()]
    return {"classes": named} if named != [str(k) for k in range(len(named))] else {}


def is_frame(found: object) -> bool:
    """Return whether this is a pandas frame."""
    return type(found).__module__.partition(".")[0] == "pandas" and hasattr(found, "columns")


def of_frame(data: Any, test: Any, loss: str | None, how: TableForm) -> DataSet:
    """Read a frame as `load_table` reads a file: strings become classes.

    Args:
        data: The frame.
        test: A frame to measure on, or None.
        loss: Its name, or None: chosen by the target column.
        how: How rows are read; the label may be None, and the task is set here.

    Raises:
        ConfigError: If a column or the loss does not exist.
        DataError: If rows cannot be used.
    """
    own, loss = (loss, None) if is_own(loss or "") else (None, loss)
    if loss not in {None, "cross_entropy", "squared_error"}:
        raise ConfigError(
            f"loss={loss}, but a frame is for predicting classes or numbers: leave loss out"
        )
    rows = Table.of(data, "data")
    held_out = None if test is None else Table.of(test, "test")
    name = found_target(rows.frame.columns, None if how.label is None else str(how.label))
    numbers = name in rows.frame.columns and rows.frame[name].dtype.kind == "f"
    if numbers and loss is None and bool((rows.frame[name].dropna() % 1 == 0).all()):
        raise DataError(
            f"the column {name!r} holds whole numbers as {rows.frame[name].dtype}, which may be "
            "classes or numbers to predict. Give loss='squared_error' for numbers; convert "
            "classes to int64."
        )
    task = (
        "regression" if loss == "squared_error" or (loss is None and numbers) else "classification"
    )
    found = of_frames(rows, held_out, replace(how, label=name, task=task))
    kind = "numbers" if numbers else "classes"
    found = judged_by(found, own, how.metrics)
    source = "said" if loss or own else f"guessed from the column {name!r}: {kind}"
    return replace(found, info=found.info | {"loss_from": source})


def is_columns(found: object) -> bool:
    """Check whether this is a Hugging Face ``Dataset``."""
    return hasattr(found, "column_names") and hasattr(found, "with_format")


def of_columns(found: Any, where: str, target: str | None) -> Samples:
    """Read a Hugging Face ``Dataset``: the target, and inputs by name or as one ``x``."""
    names = list(found.column_names)
    target_name = found_target(names, target)
    if target_name is None or target_name not in names:
        raise DataError(
            f"{where}: the columns are {names}; name the one to predict with target=..."
        )
    inputs = {n: column_of(found, n, where) for n in names if n != target_name}
    if not inputs:
        raise DataError(
            f"{where}: {target_name!r} is the only column, and there are no inputs: add some"
        )
    if INPUT_IDS not in inputs and len(inputs) > 1:
        rows = {name: np.asarray(column) for name, column in inputs.items()}
        words = [name for name, row in rows.items() if row.dtype.kind not in "biuf"]
        flat = [name for name, row in rows.items() if row.ndim != 1]
        if words or flat:
            raise DataError(
                f"{where}: the columns {words or flat} are not plain numbers. Keep one column of "
                "inputs, only columns of numbers, or input_ids and attention_mask of a "
                "tokenizer."
            )
        x = np.stack([*rows.values()], axis=1).astype(np.float32)
        return gathered((x, found[target_name][:]), where)
    given = inputs if INPUT_IDS in inputs else next(iter(inputs.values()))
    return gathered((given, column_of(found, target_name, where)), where)


def column_of(found: Any, name: str, where: str) -> Any:
    """Read a column of a Hugging Face ``Dataset`` as an array."""
    if name not in found.column_names:
        raise DataError(f"{where}: there is no column {name!r} among {list(found.column_names)}")
    return found.with_format("numpy")[name][:]


def divided_by(data: Any, partitioner: Any) -> list[RowNumbers]:
    """Divide a ``Dataset`` by a partitioner of flwr-datasets; return the rows of each client."""
    try:
        divider = copy.deepcopy(partitioner)  # a partitioner accepts a data set only once
        divider.dataset = data.add_column("__row__", list(range(len(data))))
        return [
            np.asarray(divider.load_partition(k)["__row__"][:], dtype=np.int64)
            for k in range(divider.num_partitions)
        ]
    except Exception as error:
        kind = type(partitioner).__name__
        raise DataError(f"partition: {failure_of(error, f'dividing data by a {kind}')}") from error
