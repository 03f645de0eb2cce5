"""Frames of rows: CSV, TSV and Parquet files, and what a program has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedraclora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pandas import DataFrame

SEPARATORS = {".csv": ",", ".tsv": "\t"}
Table = tuple["DataFrame", Path]  # rows, and where they are from, for messages


def named_table(found: object, where: str) -> Table:
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
    return frame, Path(where)


def _refuse_twins(names: Iterable[object], where: object) -> None:
    seen = [str(name).strip() for name in names if name == name]  # noqa: PLR0124  not NaN
    if twice := sorted({name for name in seen if seen.count(name) > 1}):
        raise DataError(f"{where} has several columns {twice[0]!r}: give each a name of its own")


def read_frame(path: Path, words: Sequence[str], separator: str | None) -> DataFrame:
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
    try:
        if kind is None:
            raise ConfigError(
                f"{path}: a name that ends in .csv, .tsv (packed or not) or .parquet is wanted; "
                "for .npz and IDX files there is data=arrays"
            )
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
            _refuse_twins(read(header=None, nrows=1, dtype=str).iloc[0], path)  # it renames them
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
        raise DataError(f"{path}: the columns are parted by semicolons; set \"data.separator=';'\"")
    return frame
