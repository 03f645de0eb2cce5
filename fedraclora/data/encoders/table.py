"""Encode rows of a table: choose features, handle missing values, and scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedraclora.data.dataset import (
    MOST_NAMED,
    DataSet,
    EncodedSamples,
    RowNumbers,
    take,
)
from fedraclora.data.encoders.array import as_scaled, scale_of
from fedraclora.data.encoders.labels import (
    as_values,
    found_classes,
    supervised,
    target_of,
)
from fedraclora.data.samples import Samples
from fedraclora.data.split import holdout_of, rows_by_use
from fedraclora.data.tables import SEPARATORS, Table, texts_of
from fedraclora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pandas import DataFrame

ColumnNames = str | int | Sequence[str | int]
USUAL = 0.9  # relative size below which distances from the median count as equal
MERGED = 10  # distinct values that become one


@dataclass(frozen=True)
class RowAdvice:
    """Advice to the user about rows that cannot be read.

    Attributes:
        gaps: Advice on missing values.
        cell: Advice on a cell that is not a number.
    """

    gaps: str
    cell: str


OF_RUN = RowAdvice(
    "Set data.missing=drop to leave such rows out, data.features to leave columns out, or fill "
    "them in the file",
    "correct the cell (leave it empty if the value is missing), or list the columns to read in "
    "data.features",
)
LATER = RowAdvice("Fill them in, or leave such rows out", "correct the cell, or leave the row out")


@dataclass(frozen=True)
class TableForm:
    """Define how rows become a data set; see `load_table` for each key.

    It also reads later rows like those of the run; see `fedraclora.data.dataset.SampleReader`.
    """

    label: str | int | None
    client: str | int | None = None
    features: ColumnNames | None = None
    test_fraction: float | None = None
    split_seed: int = 0
    task: str = "classification"
    metrics: Sequence[str] | None = None
    standardize: bool = True
    missing: str = "error"
    separator: str | None = None
    split: str | int | None = None

    def __call__(
        self, found: Any, reading: Mapping[str, Any], *, target: bool = True
    ) -> EncodedSamples:
        """Read a file, a frame, or a table."""
        if isinstance(found, Path):
            table = Table.read(found, words=[str(self.label)], separator=self.separator)
        else:
            table = found if isinstance(found, Table) else Table.of(found, "data")
        mend = OF_RUN if isinstance(found, Table) else LATER
        purpose = "which predictions are compared with (predict needs none)"
        label = _later(table, str(self.label), purpose) if target else None
        features = [_later(table, name, LEARNT) for name in reading["features"]]
        x, labels, _, kept = _rows(table, features, label, None, self.missing, mend)
        wanted = torch.zeros(len(x))
        if target:
            names = [*map(str, reading.get("classes", []))]
            wanted = target_of(labels, names, table.path, kept)
        return EncodedSamples(_scaled(Samples({"x": x}, wanted), reading), kept, len(table.frame))


LEARNT = "which the run was trained on"


def _later(table: Table, name: str, purpose: str) -> str:
    """Return a column that rows for a finished run must have.

    Args:
        table: The rows.
        name: The column.
        purpose: Its purpose in the run, for the message.

    Raises:
        ConfigError: If it is missing. Another column is suggested only if its spelling is close.
    """
    columns = [*map(str, table.frame.columns)]
    if name in columns:
        return name
    alike = [each for each in columns if each.casefold() == name.casefold()]
    what = f"rename {alike[0]!r} to {name!r}" if alike else "add it"
    raise ConfigError(
        f"data: {table.path} lacks the column {name!r}, {purpose}: {what} (it has "
        f"{', '.join(columns)})"
    )


def of_frames(table: Table, test: Table | None, how: TableForm, source: str = "a frame") -> DataSet:
    """Build a data set from rows; raises like `load_table`.

    Args:
        table: The rows.
        test: Test rows, or None to hold out some of ``table``.
        how: How they are read.
        source: The name of the table in the summary.
    """
    tested = None if test is None else test.path
    held = holdout_of(how.test_fraction, how.split_seed, test_file=tested, split=how.split)
    if how.split is not None:
        return _of_splits(table, how, source)
    frame, path = table.frame, table.path
    if how.label is None:
        raise ConfigError(
            f"data.label is not set: name the column to predict. {path} has {[*frame.columns]}."
        )
    named = table.column("data.label", how.label)
    owner = None if how.client is None else table.column("data.client", how.client)
    if owner == named:
        raise ConfigError(f"data.client={owner} is also data.label: name another column, or none")
    used, left_out = _features(table, how.features, named, owner)
    x, labels, clients, kept = _rows(table, used, named, owner, how.missing)
    dropped = len(frame) - len(kept)
    classes = found_classes(labels, named, how.task, path)
    train = Samples({"x": x}, target_of(labels, classes))
    owners = None if clients is None else np.array(clients)
    everyone = None if owner is None else np.array(texts_of(frame[owner].dropna()))
    if held is not None:
        strata = np.array(labels) if how.task == "classification" else None
        rows, out = held.split(len(train), labels=strata)
        train, held_out = take(train, rows), take(train, out)
        owners = owners if owners is None else owners[rows]
    texts = bool(SEPARATORS.keys() & {*path.suffixes})  # a CSV file has no types
    named_as = as_values(classes, None if texts else frame[named].dropna().tolist())
    reading: dict[str, Any] = {"features": used} | ({"classes": named_as} if classes else {})
    if how.standardize:
        x, y = train.inputs["x"], train.target
        reading |= scale_of(x) | ({"target": scale_of(y)} if y.is_floating_point() else {})
    raw, train = train, _scaled(train, reading)
    _refuse_flat(path, [*used, named], raw, train)
    if held is not None:
        held_out = _scaled(held_out, reading)
    else:
        read = how(test, reading)
        held_out, dropped = read.samples, dropped + read.total - len(read.rows)
    info: dict[str, object] = {"source": source, "rows_dropped": dropped} | _told(reading)
    info |= {} if held is None else {"held_out": held.fraction}
    info["features"] = used if len(used) <= MOST_NAMED else len(used)
    info |= {"columns_left_out": left_out} if left_out else {}
    return supervised(
        train,
        held_out,
        classes,
        how.task,
        metrics=how.metrics,
        owners=owners,
        clients=everyone,
        client=str(how.client),
        info=info,
        reading=reading,
        reader=how,
    )


def _of_splits(table: Table, how: TableForm, source: str) -> DataSet:
    """Build a data set from rows whose use is in a column; arguments as of `of_frames`."""
    plain, column = replace(how, split=None), table.column("data.split", str(how.split))
    values = np.array(texts_of(table.frame[column]))
    rows = rows_by_use(values, f"{table.path}: data.split={column}")
    parts = {use: table.frame.iloc[some].drop(columns=column) for use, some in rows.items()}
    train, tested = (Table(parts[name], table.path) for name in ("train", "test"))
    found = of_frames(train, tested, plain, source)

    def read(rows: DataFrame) -> Samples | None:
        return plain(Table(rows, table.path), found.reading).samples if len(rows) else None

    tests: list[Samples | None] = []
    if how.client is not None:
        whose = np.array(texts_of(parts["test"][str(how.client)]))
        clients = np.unique(found.columns["client"])
        tests = [read(parts["test"][whose == name]) for name in clients]
    return replace(found, tests=tests if any(tests) else (), validation=read(parts["validation"]))


def _features(
    table: Table, asked: ColumnNames | None, label: str, client: str | None
) -> tuple[list[str], list[str]]:
    """Choose the feature columns; return the ignored columns, too."""
    from pandas.api.types import is_numeric_dtype

    numeric = {str(name) for name, kind in table.frame.dtypes.items() if is_numeric_dtype(kind)}
    others = [str(name) for name in table.frame.columns if name not in {label, client}]
    if asked is None:
        used = [name for name in others if name in numeric]
        for name in others:
            if name not in numeric:
                _refuse_spoilt(table, name)
    else:
        named = [asked] if isinstance(asked, str | int) else asked
        used = [table.column("data.features", name) for name in named]
    words = [name for name in used if name not in numeric]
    if label in used or words or not used or len(set(used)) < len(used):
        raise ConfigError(
            f"data.features={used}: name different columns of numbers, without the label. "
            f"{table.path} has {[name for name in others if name in numeric]}"
            + (f", and words in {words}" if words else "")
        )
    return used, [name for name in others if name not in used]


def _refuse_spoilt(table: Table, name: str, share: float = 0.5, mend: RowAdvice = OF_RUN) -> None:
    """Reject a numeric column with a cell that is no number: it would be ignored silently.

    Args:
        table: The rows.
        name: A column with other values than numbers.
        share: Fraction of numeric cells above which the others are errors.
        mend: Advice for the user.

    Raises:
        DataError: Naming the first such cell.
    """
    import pandas as pd

    cells = table.frame[name].reset_index(drop=True).dropna().astype(str)
    numbers = pd.to_numeric(cells, errors="coerce").notna()
    if numbers.mean() > share:
        row = numbers.idxmin()
        raise DataError(
            f"{table.path}: column {name} holds numbers, but {cells[row]!r} in row {int(row) + 1}: "
            f"{mend.cell}"
        )
    if pd.to_numeric(cells.str.replace(",", "."), errors="coerce").notna().mean() > 0.5:
        raise DataError(
            f"{table.path}: column {name} holds numbers with decimal commas, such as "
            f"{cells.iloc[0]!r}: write decimal points"
        )


def _rows(
    table: Table,
    features: list[str],
    label: str | None,
    client: str | None,
    missing: str,
    mend: RowAdvice = OF_RUN,
) -> tuple[torch.Tensor, list[str], list[str] | None, RowNumbers]:
    """Select the used columns, and refuse or drop rows with missing values.

    Returns:
        Features float64 [N, d], labels and clients as written, and their row numbers.
    """
    frame, path = table.frame, table.path
    try:
        x = frame[features].to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        for name in features:
            if frame[name].dtype.kind not in "biuf":
                _refuse_spoilt(table, name, -1.0, mend)
        raise DataError(f"{path}: {features} do not all hold numbers: {error}") from error
    gaps = {name: ~np.isfinite(x[:, place]) for place, name in enumerate(features)}
    gaps |= {name: frame[name].isna().to_numpy() for name in (label, client) if name is not None}
    missing_rows = np.logical_or.reduce([*gaps.values()])
    if missing == "error" and missing_rows.any():
        gaps_by_column = [
            f"{name} in {int(gap.sum())} rows" for name, gap in gaps.items() if gap.any()
        ]
        raise DataError(
            f"{path}: values are missing or infinite in {', '.join(gaps_by_column[:5])}, first "
            f"in row {int(np.flatnonzero(missing_rows)[0]) + 1}. {mend.gaps}"
        )
    if missing_rows.all():
        raise DataError(
            f"{path}: every row has a missing value: check data.features, data.label, data.client"
        )
    whole = frame[~missing_rows]
    clients = None if client is None else texts_of(whole[client])
    labels = [] if label is None else texts_of(whole[label])
    return torch.from_numpy(x[~missing_rows]), labels, clients, np.flatnonzero(~missing_rows)


def _refuse_flat(path: Path, names: list[str], raw: Samples, scaled: Samples) -> None:
    """Reject a column whose values become equal by scaling or in float32.

    Args:
        path: The source of the rows, for messages.
        names: The features, and the column to predict.
        raw: Samples before scaling.
        scaled: Samples after scaling.

    Raises:
        DataError: Naming the column.
    """
    columns = [[*s.inputs["x"].numpy().T, s.target.numpy()] for s in (raw, scaled)]
    for name, values, became in zip(names, *columns, strict=True):
        with np.errstate(over="ignore"):
            away = abs(values - np.median(values))
            near = away <= np.quantile(away, USUAL, method="lower")
        before, after = (len(np.unique(each[near])) for each in (values, became))
        if after < before and (after == 1 or MERGED * after <= before):
            raise DataError(
                f"{path}: column {name} has values from {values.min():g} to {values.max():g}, "
                f"and scaling to float32 leaves {after} of {before} different ones. Correct or "
                "drop rows with extreme values, subtract a common offset, or leave the column "
                "out (data.features)."
            )


def _scaled(samples: Samples, reading: Mapping[str, Any]) -> Samples:
    """Scale features, and a number to predict, if they have a scale; float32."""
    x, y = samples.inputs["x"], samples.target
    x = as_scaled(x, reading) if "subtract" in reading else x
    y = as_scaled(y, reading["target"]) if "target" in reading else y
    scaled = Samples({"x": x}, y).clone().to("cpu", torch.float32)
    if not bool(torch.isfinite(scaled.inputs["x"]).all()):
        place = int((~torch.isfinite(scaled.inputs["x"])).any(dim=0).nonzero()[0])
        raise DataError(
            f"column {reading['features'][place]} has values up to "
            f"{float(samples.inputs['x'][:, place].abs().max()):g}, which float32 cannot hold: "
            "correct or drop such rows, or leave the column out (data.features)"
        )
    return scaled


def _told(scale: Mapping[str, Any]) -> dict[str, object]:
    """Describe the scaling for the summary."""
    info: dict[str, object] = {}
    if len(scale.get("subtract", range(MOST_NAMED + 1))) <= MOST_NAMED:
        info |= {"feature_means": scale["subtract"], "feature_deviations": scale["divide_by"]}
    if label := scale.get("target"):
        info |= {"label_mean": label["subtract"], "label_deviation": label["divide_by"]}
    return info
