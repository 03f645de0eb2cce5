"""Load tables of numbers: CSV, TSV, Parquet or JSON Lines, with a column to predict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fedraclora.data.dataset import NO_CLASSES, NUMERIC, UNDIVIDED, DataSet
from fedraclora.data.encoders.labels import (
    TaskName,
)
from fedraclora.data.encoders.table import ColumnNames, TableForm, of_frames
from fedraclora.data.locate import Root, resolve
from fedraclora.data.split import holdout_of
from fedraclora.data.tables import Table
from fedraclora.limits import Fraction, OneOf, limited


@NUMERIC
@NO_CLASSES.where(lambda it: it["task"] == "regression")
@UNDIVIDED
@limited("data")
def load_table(
    *,
    file: str | None = None,
    label: str | int | None = None,
    client: str | int | None = None,
    features: ColumnNames | None = None,
    root: Root = None,
    test_file: str | None = None,
    test_fraction: Fraction | None = None,
    split_seed: int = 0,
    task: TaskName = "classification",
    metrics: Sequence[str] | None = None,
    standardize: bool = True,
    missing: Annotated[str, OneOf(("error", "drop"))] = "error",
    separator: str | None = None,
    split: str | int | None = None,
) -> DataSet:
    """Load a table of numbers.

    Args:
        file: The rows: a path (also relative to ``root``) or ``package:NAME/path``, of a file whose
            name ends in .csv, .tsv or .tab (with .gz, .bz2, .xz, .zip or not), .parquet or .jsonl.
        label: The column to predict. Classes are numbered in the sorted order of their names.
        client: The column that names the client, or None.
        features: The columns to predict from; None: all other numeric columns.
        root: The folder that paths may be relative to, or None.
        test_file: A file of test rows, or None to hold out rows of ``file``.
        test_fraction: The fraction to hold out, per class; None: 0.2.
        split_seed: Seed of that split.
        task: ``classification`` or ``regression``.
        metrics: Names of metrics, the primary one first; None for those usual for the task.
        standardize: Give each feature, and a number to predict, mean 0 and deviation 1 over the
            training rows.
        missing: Handling of rows with missing values: ``error`` or ``drop``.
        separator: Separator of columns; None: a comma, in .tsv and .tab a tab.
        split: The column that marks each row as train, test or validation. A client measures on its
            own test rows (evaluate.clients), the server on those of all clients.

    Returns:
        Inputs ``"x"`` float32 [N, features]; targets int64 [N] (classes) or float32 [N].

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If a file is missing, or rows cannot be used.
    """
    holdout_of(test_fraction, split_seed, test_file=test_file, split=split)  # before a file is read

    def read(spelling: str, key: str, *columns: str | int | None) -> Table:
        path = resolve(spelling, key=key, root=root)
        return Table.read(
            path, words=[str(c) for c in columns if c is not None], separator=separator
        )

    table = read(str(file or ""), "data.file", label, client, split)
    tested = None if test_file is None else read(test_file, "data.test_file", label)
    how = TableForm(
        *(label, client, features, test_fraction, split_seed),
        *(task, metrics, standardize, missing, separator),
        split=split,
    )
    return of_frames(table, tested, how, str(file))
