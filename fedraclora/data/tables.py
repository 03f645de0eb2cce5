"""Read tables: CSV, TSV, Parquet and JSON Lines files, and frames of a program."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from fedraclora.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from pandas import DataFrame

SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
JSON_LINES = {".jsonl", ".json"}
KINDS = {*SEPARATORS, *JSON_LINES, ".parquet"}
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Table:
    """Hold rows with a name for each column.

    Attributes:
        frame: The rows; columns are named by text.
        path: Their source, for messages.
    """

    frame: DataFrame
    path: Path

    @classmethod
    def of(cls, found: object, where: str) -> Table:
        """Convert a frame of a program to a table.

        Raises:
            DataError: If it is no frame, has no rows, or two columns have one name.
        """
        import pandas as pd

        if not isinstance(found, pd.DataFrame):
            path = "" if where == "test" else ", or the path of such a table,"
            raise DataError(
                f"{where} is a {type(found).__name__}. Give a pandas frame with the columns of "
                f"data{path} (pandas.read_csv reads one)."
            )
        frame = found.rename(columns=str)
        _refuse_twins(frame.columns, where)
        if not len(frame):
            raise DataError(f"{where} holds no rows")
        return cls(frame, Path(where))

    @classmethod
    def read(
        cls,
        path: Path,
        *,
        words: Sequence[str] | None = (),
        separator: str | None = None,
        header: bool = True,
    ) -> Table:
        """Read a whole file, packed (.gz, .bz2, .xz; .zip for numbers) or not.

        Args:
            path: A file whose name ends in .csv, .tsv, .tab, .parquet or .jsonl.
            words: Columns of a .csv or .tsv that are kept as text; the others become numbers if all
                their cells are. None: all columns, and nothing is stripped; a .tsv is then read
                without quoting, since sentences contain single quotes.
            separator: Separator of columns in a .csv or .tsv; None: a comma, or a tab.
            header: Whether its first row names the columns; else they are 0, 1, ...

        Raises:
            ConfigError: If the kind of file is not known.
            DataError: If it cannot be read, a row has too few or too many fields, or it has none.
        """
        import pandas as pd

        kind = next((s for s in reversed(path.suffixes) if s in KINDS), None)
        if kind is None:
            raise ConfigError(
                f"{path}: the name must end in .csv, .tsv, .tab, .parquet or .jsonl (.gz or .bz2 "
                "may follow). For .npz and IDX files use data=arrays."
            )
        try:
            if kind == ".parquet":
                frame = pd.read_parquet(path)
            elif kind in JSON_LINES:
                frame = pd.DataFrame(_json_rows(path), dtype=object)
                frame = frame if words is None else frame.infer_objects()
            elif words is None:
                frame = _written_cells(path, separator or SEPARATORS[kind], header=header)
            else:
                frame = _typed_cells(path, separator or SEPARATORS[kind], words)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
        except (OSError, ValueError, EOFError, csv.Error, lzma.LZMAError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{path} cannot be read as a table: {reason}") from error
        frame.columns = [str(name).strip() for name in frame.columns]
        if not len(frame):
            raise DataError(f"{path} holds no rows")
        if len(frame.columns) == 1 and ";" in frame.columns[0]:
            raise DataError(
                f"{path}: the columns are separated by semicolons: set \"data.separator=';'\""
            )
        return cls(frame, path)

    def column(self, key: str, name: str | int) -> str:
        """Return the name of a column by a key's value: its name, or its number from 0.

        Raises:
            ConfigError: If there is none.
        """
        names = [*self.frame.columns]
        if str(name) in names:
            return str(name)
        if isinstance(name, int) and 0 <= name < len(names):
            return str(names[name])
        raise ConfigError(f"{key}: {self.path}: {unknown('column', name, names)}")

    def texts(self, key: str, name: str | int) -> list[str]:
        """Return a column as texts; a missing value becomes an empty text.

        Raises:
            ConfigError: If there is no such column.
        """
        values = self.frame[self.column(key, name)]
        return ["" if gap else str(v) for gap, v in zip(values.isna(), values, strict=True)]

    def rows(self) -> list[Mapping[str, Any]]:
        """Yield each row as a dict of columns."""
        return [*self.frame.to_dict("records")]


def texts_of(column: object) -> list[str]:
    """Convert values to texts; integers have no decimal point, whatever their type."""
    values = np.asarray(column, dtype=object)
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values)
    return [str(value).strip() for value in whole]


def _typed_cells(path: Path, separator: str, words: Sequence[str]) -> DataFrame:
    """Read a .csv or .tsv with pandas: columns of numbers become numbers."""
    import pandas as pd

    read = partial(
        pd.read_csv,
        path,
        sep=separator,
        encoding="utf-8-sig",
        skipinitialspace=True,
        low_memory=False,
    )
    _refuse_twins(read(header=None, nrows=1, dtype=str).iloc[0], path)  # pandas renames duplicates
    frame = read(dtype=dict.fromkeys(words, str))
    if not isinstance(frame.index, pd.RangeIndex):  # pandas used the first column as an index
        raise DataError(f"{path}: its rows have more fields than the first row, which names them")
    return frame


def _written_cells(path: Path, separator: str, *, header: bool) -> DataFrame:
    """Read the cells of a .csv or .tsv as text."""
    import pandas as pd

    rows: list[list[str]] = []
    with open_text(path) as file:
        plain = separator == "\t"
        reader = csv.reader(
            file, delimiter=separator, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
        )
        for cells in filter(None, reader):  # without blank lines, as at the end of a file
            if rows and len(cells) != len(rows[0]):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} fields, but the first row has "
                    f"{len(rows[0])}"
                )
            rows.append(cells)
    names = rows.pop(0) if header and rows else [str(n) for n in range(len(rows[0]) if rows else 0)]
    _refuse_twins([name for name in names if name.strip()], path)
    return pd.DataFrame(rows, columns=names, dtype=object)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number} is not a JSON object: write one in each line"
                )
            rows.append(row)
    return rows


def open_text(path: Path) -> TextIO:
    """Open a text file, packed or not; a byte-order mark is skipped."""
    opener: Any = _OPENERS.get(path.suffix, open)
    file: TextIO = opener(path, "rt", encoding="utf-8-sig", newline="")
    return file


def _refuse_twins(names: Iterable[object], where: object) -> None:
    seen = [str(name).strip() for name in names if name == name]  # noqa: PLR0124  not NaN
    if twice := sorted({name for name in seen if seen.count(name) > 1}):
        raise DataError(f"{where} has several columns named {twice[0]!r}: give each another name")
