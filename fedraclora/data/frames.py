"""Tables: frames of CSV, TSV and Parquet files and of programs, columns of text, labels.

Texts are read as they stand: a TSV without quoting, a CSV with it, plain or packed (.gz, .bz2).
"""

from __future__ import annotations

import bz2
import csv
import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import numpy as np
import torch

from fedraclora.data.dataset import Column, DataSet, RowNumbers
from fedraclora.data.fit import found_shape, outputs_for
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError, DataError, unknown
from fedraclora.limits import OneOf

if TYPE_CHECKING:
    from pandas import DataFrame


SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
NamedColumn = tuple[str, str | int]  # a key of the config, and the column that it names
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open}
OBJECTIVES = {  # the loss of each, and its metrics
    "classification": ("cross_entropy", ("accuracy", "loss")),
    "regression": ("squared_error", ("pearson", "spearman", "loss")),
}
TaskName = Annotated[str, OneOf(OBJECTIVES)]
# Of arrays there are those, too, of which a sample has many targets, by the names of their losses.
OF_ARRAYS = {name: (name, LOSSES[name].metrics) for name in ("multi_label", "pixel_classes")}
ArrayTask = Annotated[str, OneOf((*OBJECTIVES, *OF_ARRAYS))]


@dataclass(frozen=True)
class NamedTable:
    """Rows with a name for each column.

    Attributes:
        frame: The rows.
        path: Where they are from, for messages.
    """

    frame: DataFrame
    path: Path

    @classmethod
    def of(cls, found: object, where: str) -> NamedTable:
        """Take a frame of a program as a table, its columns by text.

        Raises:
            DataError: If it is no frame, has no rows, or two columns have one name.
        """
        import pandas as pd

        if not isinstance(found, pd.DataFrame):
            path = "" if where == "test" else ", or the path of such a table,"
            raise DataError(
                f"{where} is a {type(found).__name__}; a frame of pandas with the columns of data"
                f"{path} is wanted (pandas.read_csv reads one)"
            )
        frame = found.rename(columns=str)
        _refuse_twins(frame.columns, where)
        if not len(frame):
            raise DataError(f"{where} holds no rows")
        return cls(frame, Path(where))

    @classmethod
    def read(cls, path: Path, words: Sequence[str], separator: str | None) -> NamedTable:
        """Read a whole table.

        Args:
            path: The file.
            words: Columns whose values are kept as they are written.
            separator: What parts the columns, or None.

        Raises:
            ConfigError: If the kind of file is not known.
            DataError: If it cannot be read, or has no rows.
        """
        import pandas as pd

        kind = next((s for s in reversed(path.suffixes) if s in {*SEPARATORS, ".parquet"}), None)
        if kind is None:
            raise ConfigError(
                f"{path}: a name that ends in .csv, .tsv, .tab (packed or not) or .parquet is "
                "wanted; for .npz and IDX files there is data=arrays"
            )
        try:
            if kind == ".parquet":
                frame = pd.read_parquet(path)
            else:
                read = partial(
                    pd.read_csv,
                    path,
                    sep=separator or SEPARATORS[kind],
                    encoding="utf-8-sig",
                    skipinitialspace=True,
                    low_memory=False,
                )
                _refuse_twins(read(header=None, nrows=1, dtype=str).iloc[0], path)  # it renames
                frame = read(dtype=dict.fromkeys(words, str))
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from error
        except (OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path} cannot be read as a table: {reason}") from error
        frame.columns = [str(name).strip() for name in frame.columns]
        if not len(frame):
            raise DataError(f"{path} holds no rows")
        if len(frame.columns) == 1 and ";" in frame.columns[0]:
            raise DataError(
                f"{path}: the columns are parted by semicolons; set \"data.separator=';'\""
            )
        return cls(frame, path)

    def column(self, key: str, name: str | int) -> str:
        """Give the name of a column that a key of the config names.

        Raises:
            ConfigError: If there is none.
        """
        if str(name) not in self.frame.columns:
            error = unknown("column", name, [*self.frame.columns])
            raise ConfigError(f"{key}: {self.path}: {error}")
        return str(name)


def _refuse_twins(names: Iterable[object], where: object) -> None:
    seen = [str(name).strip() for name in names if name == name]  # noqa: PLR0124  not NaN
    if twice := sorted({name for name in seen if seen.count(name) > 1}):
        raise DataError(f"{where} has several columns {twice[0]!r}: give each a name of its own")


def read_columns(path: Path, columns: Sequence[NamedColumn], *, header: bool) -> list[list[str]]:
    """Read some columns of a table as strings.

    A TSV is read with quoting off, for sentences hold lone quotes. A byte-order mark is skipped.

    Args:
        path: A file whose name ends in .tsv, .tab or .csv, with .gz or .bz2 after that or not.
        columns: Pairs of the configuration key (for messages) and a column: its name in the
            header, or its number from 0.
        header: Whether the first row holds names; without it columns are numbers.

    Returns:
        One list per column, all of the same length.

    Raises:
        ConfigError: If the kind of file or a column is not known.
        DataError: If the file cannot be read or a row is too short, with its line.
    """
    packed = path.suffix if path.suffix in _OPENERS else ""
    kind = path.name.removesuffix(packed)[-4:]
    if kind not in SEPARATORS:
        raise ConfigError(
            f"{path}: a name that ends in .tsv, .tab or .csv, or one of them and .gz or .bz2, is "
            "wanted"
        )
    rows, found = read_cells(path, SEPARATORS[kind]), [list[str]() for _ in columns]
    try:
        _, names = next(rows, (0, [])) if header else (0, [])
        places = [_place(key, column, names, header) for key, column in columns]
        for line, row in rows:
            if short := [place for place in places if place >= len(row)]:
                raise DataError(
                    f"{path}, line {line}: {len(row)} fields, column {short[0]} is wanted"
                )
            for place, values in zip(places, found, strict=True):
                values.append(row[place])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error
    return found


def open_text(path: Path) -> TextIO:
    """Open a text file, packed or not; a byte-order mark is skipped."""
    opener: Any = _OPENERS.get(path.suffix, open)
    file: TextIO = opener(path, "rt", encoding="utf-8-sig", newline="")
    return file


def read_cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Give the cells of each row with its line; between tabs quotes are as any other sign."""
    plain = delimiter == "\t"
    with open_text(path) as file:
        reader = csv.reader(
            file, delimiter=delimiter, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
        )
        for cells in filter(None, reader):  # without blank lines, as at the end of a file
            yield reader.line_num, cells


def _place(key: str, column: str | int, names: list[str], header: bool) -> int:
    """Turn a column's name or number into its number."""
    if header and str(column) in names:
        return names.index(str(column))
    if isinstance(column, int) and not isinstance(column, bool) and column >= 0:
        if header and column >= len(names):
            raise ConfigError(
                f"{key}={column}: there is no such column; the table has {len(names)}, counted "
                "from 0"
            )
        return column
    if not header:
        raise ConfigError(f"{key}={column}: a table without header has columns 0, 1, 2, ...")
    raise ConfigError(f"{key}: {unknown('column', column, names)}")


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
                f"data.values={names}: the labels {missing} do not occur in the data, or one is "
                "named twice"
            )
        return names
    numeric = all(name.removeprefix("-").isdigit() for name in found)
    return sorted(found, key=int) if numeric else sorted(found)


def as_values(names: Sequence[str], values: object = None) -> list[Any]:
    """Give classes as their column has them: whole numbers and truth values as such, else texts.

    Args:
        names: Of the classes, in their order.
        values: Those of the column; None: of a file of texts, where whole numbers count as such.

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
    """Name the classes of a column of labels; none where numbers are predicted.

    Args:
        labels: Of each row.
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
            "classes; to predict a number set data.task=regression"
        )
    whole = all(name.lstrip("-").isdigit() for name in names)
    if whole and len(names) > max(100, len(labels) / 10):
        raise ConfigError(
            f"data.label={label}: {len(names)} whole numbers in {len(labels)} rows are hardly "
            "classes; to predict a number set data.task=regression (classes may be words)"
        )
    if len(names) < 2:
        raise ConfigError(f"data.label={label}: {source} has the one value {names} only")
    return names


def target_of(
    labels: Sequence[str],
    names: Sequence[str],
    where: object = "test",
    rows: RowNumbers | None = None,
) -> torch.Tensor:
    """Turn labels into classes by their place in ``names``, or into scores.

    Args:
        labels: Of each row.
        names: Of the classes, in their order; none where numbers are predicted.
        where: What has the labels, for messages.
        rows: Its rows that they stand in, from 0; None: all.

    Returns:
        int64 [N] (classes), or float32 [N] (scores).

    Raises:
        DataError: If a label is none of the classes, or a score no finite number.
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
                    "numbers: set data.task=classification, or mend the rows that have it"
                ) from error
        if not np.isfinite(scores).all():
            raise DataError(
                "data.label: a score is NaN, infinite or larger than float32 can hold: mend it, or "
                "leave its row out"
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
    """Build a data set of samples with classes or with numbers to predict.

    Args:
        train: Training samples.
        test: Held-out samples.
        names: Of the classes, in their order; none for numbers.
        task: A key of `OBJECTIVES` or `OF_ARRAYS`.
        metrics: Names of metrics, the headline first; None for those usual for the task.
        owners: The client of each training row, or None.
        client: The name of that column in the table.
        info: Facts for the summary.
        reading: See `DataSet`; the classes are added where they are missing, as `as_values` has
            those of a file.
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
