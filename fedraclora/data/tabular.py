"""Tables of numbers: CSV, TSV or Parquet, with a column to predict and perhaps one of clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from fedraclora.data.dataset import SHARE, SHOWN, DataSet, refuse_both, train_test
from fedraclora.data.fit import as_scaled, scale_of
from fedraclora.data.labels import Kind, classes_of, supervised, target_of
from fedraclora.data.locate import resolve
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError, unknown
from fedraclora.limits import Fraction, choice_of, limited

if TYPE_CHECKING:
    from pandas import DataFrame

SEPARATORS = {".csv": ",", ".tsv": "\t"}


@limited("data")
def load_table(
    *,
    file: str | None,
    label: str | int | None,
    client: str | int | None = None,
    features: str | int | Sequence[str | int] | None = None,
    root: str | None = None,
    test: str | None = None,
    test_share: Fraction | None = None,
    split_seed: int = 0,
    task: Kind = "classification",
    metrics: Sequence[str] | None = None,
    standardise: bool = True,
    missing: Annotated[str, choice_of(("error", "drop"))] = "error",
    separator: str | None = None,
) -> DataSet:
    """Load a table of numbers.

    Args:
        file: The rows: a path (also relative to ``root``) or ``package:NAME/path``, of a file whose
            name ends in .csv or .tsv (with .gz, .bz2, .xz, .zip or not) or in .parquet.
        label: The column to predict. Classes are numbered in the sorted order of their names.
        client: The column that says whose a row is, or None.
        features: The columns to predict from; None for all others that hold numbers.
        root: The data root, or None.
        test: A file of test rows, or None to hold rows of ``file`` out.
        test_share: The fraction that is held out, per class; None for 0.2.
        split_seed: Seed of that choice.
        task: ``classification`` or ``regression``.
        metrics: Names of metrics, the headline first; None for those usual for the task.
        standardise: Give each feature, and a number to predict, mean 0 and deviation 1 over the
            training rows.
        missing: What becomes of rows in which something is missing: ``error`` or ``drop``.
        separator: What parts the columns; None: a comma, in .tsv a tab.

    Returns:
        Inputs ``"x"`` float32 [N, features]; targets int64 [N] (classes) or float32 [N].

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If a file is missing, or rows cannot be used.
    """
    refuse_both(test, test_share)
    path = resolve(str(file or ""), key="data.file", root=root)
    frame = read_frame(path, _names(label, client), separator)
    held, held_path = None, Path()
    if test is not None:
        held_path = resolve(test, key="data.test", root=root)
        held = read_frame(held_path, _names(label, None), separator)
    return of_frames(
        (frame, path),
        None if held is None else (held, held_path),
        label=label,
        client=client,
        features=features,
        test_share=test_share,
        split_seed=split_seed,
        task=task,
        metrics=metrics,
        standardise=standardise,
        missing=missing,
        source=str(file),
    )


Table = tuple["DataFrame", Path]  # rows, and where they are from, for messages


def of_frames(
    table: Table,
    test: Table | None,
    *,
    label: str | int | None,
    client: str | int | None = None,
    features: str | int | Sequence[str | int] | None = None,
    test_share: float | None = None,
    split_seed: int = 0,
    task: str = "classification",
    metrics: Sequence[str] | None = None,
    standardise: bool = True,
    missing: str = "error",
    source: str = "a frame",
) -> DataSet:
    """Make a data set of rows; arguments and errors as of `load_table`.

    Args:
        table: The rows.
        test: Rows to test on, or None to hold some of ``table`` out.
        label: See `load_table`, as for the others.
        client: The column that says whose a row is, or None.
        features: The columns to predict from, or None.
        test_share: The fraction that is held out.
        split_seed: Seed of that choice.
        task: ``classification`` or ``regression``.
        metrics: Names of metrics, or None.
        standardise: Whether features have mean 0 and deviation 1.
        missing: What becomes of rows in which something is missing.
        source: What the summary calls the table.
    """
    frame, path = table
    named = _label(frame, label, path)
    owner = None if client is None else _column(frame, "data.client", client, path)
    if owner == named:
        raise ConfigError(f"data.client={client} is data.label, too: name another column, or none")
    used, left_out = _features(frame, features, named, owner, path)
    x, labels, clients, dropped = _rows(frame, used, named, owner, missing, path)
    classes = classes_of(labels, named, task, path)
    train = Samples({"x": x}, target_of(labels, classes, task))
    owners = None if clients is None else np.array(clients)
    everyone = None if owner is None else np.array(_written(frame[owner].dropna()))
    if test is None:
        share = SHARE if test_share is None else test_share
        strata = np.array(labels) if task == "classification" else None
        train, held_out, rows = train_test(train, "data.test_share", share, split_seed, strata)
        owners = owners if owners is None else owners[rows]
    else:
        found, other = test
        for column in used:
            _column(found, "data.test", column, other)
        x, labels, _, more = _rows(found, used, _label(found, label, other), None, missing, other)
        held_out = Samples({"x": x}, target_of(labels, classes, task))
        dropped += more
    info: dict[str, object] = {"source": source, "rows_dropped": dropped}
    reading: dict[str, object] = {"features": used}
    if standardise:
        train, held_out, scale = _standardised(train, held_out)
        info |= _told(scale)
        reading |= scale
    train, held_out = (part.clone().to("cpu", torch.float32) for part in (train, held_out))
    info["features"] = used if len(used) <= SHOWN else len(used)
    info |= {"columns_left_out": left_out} if left_out else {}
    if owners is not None:
        info["clients"] = np.unique(owners).tolist()[:SHOWN]  # by number: client 0 is the first
    return supervised(
        train,
        held_out,
        classes,
        task,
        metrics=metrics,
        owners=owners,
        clients=everyone,
        client=str(client),
        info=info,
        reading=reading,
    )


def new_rows(table: Table, label: str | None, reading: Mapping[str, Any]) -> Samples:
    """Bring rows that a run has not seen to the form of those that it was trained on.

    Args:
        table: The rows.
        label: The column to predict.
        reading: `DataSet.reading`: columns, classes and scale of the training rows.

    Raises:
        ConfigError: If a column is missing, or the run was not trained on a table.
        DataError: If values are missing, or a label is none of the classes.
    """
    frame, path = table
    if "features" not in reading:
        raise ConfigError(
            "the run was not trained on a table with named columns: give (inputs, target) as "
            "arrays, on the scale of the training samples"
        )
    features, names = reading["features"], reading.get("classes", [])
    for name in features:
        _column(frame, "data", name, path)
    x, labels, _, _ = _rows(frame, features, _label(frame, label, path), None, "error", path)
    target = target_of(labels, names, "classification" if names else "regression")
    if "subtract" in reading:
        x = as_scaled(x, reading)
    if "target" in reading:
        target = as_scaled(target, reading["target"]).float()
    return Samples({"x": x.float()}, target)


def named_table(found: object, where: str) -> Table:
    """Take a frame of a program as a table, its columns by text.

    Raises:
        DataError: If it is no frame, has no rows, or two columns have one name.
    """
    import pandas as pd

    if not isinstance(found, pd.DataFrame):
        raise DataError(
            f"{where} is a {type(found).__name__}; a frame of pandas with the columns of data is "
            "wanted"
        )
    frame = found.rename(columns=str)
    if twice := sorted({*frame.columns[frame.columns.duplicated()]}):
        raise DataError(f"{where} has several columns {twice[0]!r}: give each a name of its own")
    if not len(frame):
        raise DataError(f"{where} holds no rows")
    return frame, Path(where)


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
            frame = pd.read_csv(
                path,
                sep=separator or SEPARATORS[kind],
                dtype=dict.fromkeys(words, str),
                encoding="utf-8-sig",
                skipinitialspace=True,
                low_memory=False,
            )
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


def _names(*columns: str | int | None) -> list[str]:
    return [str(column) for column in columns if column is not None]


def _label(frame: DataFrame, label: str | int | None, path: Path) -> str:
    if label is None:
        raise ConfigError(
            f"data.label is not set: name the column to predict; {path} has {[*frame.columns]}"
        )
    return _column(frame, "data.label", label, path)


def _column(frame: DataFrame, key: str, column: str | int, path: Path) -> str:
    if str(column) not in frame.columns:
        raise ConfigError(f"{key}: {path}: {unknown('column', column, [*frame.columns])}")
    return str(column)


def _features(
    frame: DataFrame,
    asked: str | int | Sequence[str | int] | None,
    label: str,
    client: str | None,
    path: Path,
) -> tuple[list[str], list[str]]:
    """Choose the columns to predict from; give those that are left out, too."""
    from pandas.api.types import is_numeric_dtype

    numeric = {str(name) for name in frame.columns if is_numeric_dtype(frame[name])}
    others = [str(name) for name in frame.columns if name not in {label, client}]
    if asked is None:
        used = [name for name in others if name in numeric]
        for name in others:
            if name not in numeric:
                _refuse_spoilt(frame, name, path)
    else:
        named = [asked] if isinstance(asked, str | int) else asked
        used = [_column(frame, "data.features", name, path) for name in named]
    words = [name for name in used if name not in numeric]
    if label in used or words or not used or len(set(used)) < len(used):
        raise ConfigError(
            f"data.features={used}: different columns of numbers, without the label, are wanted; "
            f"{path} has {[name for name in others if name in numeric]}"
            + (f", and words in {words}" if words else "")
        )
    return used, [name for name in others if name not in used]


def _refuse_spoilt(frame: DataFrame, name: str, path: Path) -> None:
    """Reject a column of numbers with a cell that is none: it would be left out in silence.

    Raises:
        DataError: Naming the first such cell.
    """
    import pandas as pd

    cells = frame[name].dropna().astype(str)
    if pd.to_numeric(cells, errors="coerce").notna().mean() > 0.5:
        row = pd.to_numeric(cells, errors="coerce").isna().idxmax()
        raise DataError(
            f"{path}: column {name} holds numbers, but {cells[row]!r} in row {int(row) + 1}: mend "
            "the cell (leave it empty if it is missing), or list columns in data.features"
        )
    if pd.to_numeric(cells.str.replace(",", "."), errors="coerce").notna().mean() > 0.5:
        raise DataError(
            f"{path}: column {name} holds numbers with decimal commas, such as {cells.iloc[0]!r}: "
            "write them with points"
        )


def _rows(
    frame: DataFrame, features: list[str], label: str, client: str | None, missing: str, path: Path
) -> tuple[torch.Tensor, list[str], list[str] | None, int]:
    """Take the columns that are used, and refuse or drop rows that miss something.

    Returns:
        Features float64 [N, d], labels and clients as they are written, rows that were dropped.
    """
    try:
        x = frame[features].to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: {features} do not all hold numbers: {error}") from error
    gaps = {name: ~np.isfinite(x[:, place]) for place, name in enumerate(features)}
    gaps |= {name: frame[name].isna().to_numpy() for name in (label, client) if name is not None}
    gone = np.logical_or.reduce([*gaps.values()])
    if missing == "error" and gone.any():
        gaps_by_column = [
            f"{name} in {int(gap.sum())} rows" for name, gap in gaps.items() if gap.any()
        ]
        raise DataError(
            f"{path}: values are missing (or infinite): {', '.join(gaps_by_column[:5])}; the "
            f"first of them in row {int(np.flatnonzero(gone)[0]) + 1}. Set data.missing=drop to "
            "leave such rows out, data.features to leave columns out, or fill them in the file"
        )
    if gone.all():
        raise DataError(f"{path}: no row is whole: check data.features, data.label, data.client")
    whole = frame[~gone]
    clients = None if client is None else _written(whole[client])
    return torch.from_numpy(x[~gone]), _written(whole[label]), clients, int(gone.sum())


def _written(column: object) -> list[str]:
    """Values as texts; whole numbers without a point, whatever type holds them."""
    values = np.asarray(column, dtype=object)
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values)
    return [str(value).strip() for value in whole]


def _standardised(train: Samples, test: Samples) -> tuple[Samples, Samples, dict[str, Any]]:
    """Standardise features, and a number to predict, by the training rows; say its scale."""
    scale = scale_of(train.inputs["x"])
    x, test_x = (as_scaled(part.inputs["x"], scale) for part in (train, test))
    y, test_y = train.target, test.target
    if y.is_floating_point():
        scale["target"] = scale_of(y)
        y, test_y = (as_scaled(target, scale["target"]) for target in (y, test_y))
    return Samples({"x": x}, y), Samples({"x": test_x}, test_y), scale


def _told(scale: Mapping[str, Any]) -> dict[str, object]:
    """Say in the summary what the scale is."""
    info: dict[str, object] = {}
    if len(scale["subtract"]) <= SHOWN:
        info |= {"feature_means": scale["subtract"], "feature_deviations": scale["divide_by"]}
    if label := scale.get("target"):
        info |= {"label_mean": label["subtract"], "label_deviation": label["divide_by"]}
    return info
