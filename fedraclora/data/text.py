"""Text in tables: sentences, or pairs of them, with a label and a natural client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedraclora.data.checks import check_choice, check_count, check_fraction
from fedraclora.data.dataset import Column, DataSet, Rows, split_owners, split_rows
from fedraclora.data.labels import LOSSES, METRICS, class_names, target_of
from fedraclora.data.locate import check_file, resolve
from fedraclora.data.samples import Samples
from fedraclora.data.table import read_columns
from fedraclora.data.tokens import make_encoder
from fedraclora.errors import ConfigError, DataError
from fedraclora.rng import generator


@dataclass(frozen=True)
class _Table:
    """Texts (one list per text column), labels and clients as they are written."""

    texts: list[list[str]]
    labels: list[str]
    clients: list[str] | None

    def rows(self, wanted: Rows | list[int]) -> _Table:
        """Select rows."""

        def pick(values: list[str]) -> list[str]:
            return [values[row] for row in wanted]

        clients = None if self.clients is None else pick(self.clients)
        return _Table([pick(text) for text in self.texts], pick(self.labels), clients)


def load_text(
    *,
    file: str,
    text: Sequence[str | int],
    label: str | int,
    tokenizer: str,
    root: str | None = None,
    test_file: str | None = None,
    client: str | int | None = None,
    header: bool = True,
    task: str = "classification",
    values: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    max_length: int = 128,
    test: float = 0.2,
    test_by_client: bool = False,
    split_seed: int = 0,
    subsample: int | None = None,
    sha256: str | None = None,
    test_sha256: str | None = None,
) -> DataSet:
    """Load and tokenise a table of texts (.tsv or .csv, plain, .gz or .bz2).

    Rows with an empty text are dropped and counted in ``info``.

    Args:
        file: Training rows: a path (also relative to ``root``) or ``package:NAME/path``.
        text: One column of text, or two for pairs: names, or numbers from 0.
        label: The column of the label or score.
        tokenizer: A folder, ``package:NAME/path`` or ``hub:NAME`` for
            ``transformers.AutoTokenizer``; only the last may download.
        root: The data root, or None.
        test_file: Test rows, or None to hold some of ``file`` out.
        client: The column of the natural client, or None.
        header: Whether the first row holds the names of the columns.
        task: ``classification`` or ``regression``.
        values: The labels to keep, in the order of their classes; None for all, sorted.
        metrics: Names of metrics, the headline first; None for those usual for the task.
        max_length: Tokens per sample: shorter ones are padded, longer ones are cut.
        test: Fraction of the rows held out where there is no ``test_file``.
        test_by_client: Hold out whole clients, not rows (for validation, too).
        split_seed: Seed of that split, and of ``subsample``.
        subsample: Training rows to draw, without replacement, or None for all.
        sha256: SHA-256 of ``file``, or None.
        test_sha256: SHA-256 of ``test_file``, or None.

    Returns:
        Inputs ``input_ids``, ``attention_mask`` and what else the tokenizer gives, int64
        [N, max_length]; targets int64 [N] (classes) or float32 [N] (scores).

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If a file or a tokenizer is missing, or a row cannot be used.
    """
    check_choice("data.task", task, tuple(METRICS))
    check_count("data.max_length", max_length)
    columns = [text] if isinstance(text, str | int) else list(text)
    if len(columns) not in {1, 2}:
        raise ConfigError(f"data.text={columns}: want one column, or two for pairs of texts")
    if test_by_client and (test_file or client is None):
        raise ConfigError("data.test_by_client=true needs data.client, and data.test_file=null")
    named = [("data.text", column) for column in columns] + [("data.label", label)]

    def read(spelling: str, key: str, pin: str | None, with_client: bool) -> tuple[_Table, int]:
        path = check_file(resolve(spelling, key=key, root=root), pin)
        extra = [] if client is None or not with_client else [("data.client", client)]
        return _clean(read_columns(path, named + extra, header=header), len(columns), values)

    table, dropped = read(file, "data.file", sha256, with_client=True)
    if test_file:
        held, dropped_test = read(test_file, "data.test_file", test_sha256, with_client=False)
        dropped += dropped_test
    else:
        table, held = _split(table, test, test_by_client, split_seed, task)
    if subsample is not None:
        table = _subsample(table, subsample, split_seed)
    names = class_names(table.labels, values) if task == "classification" else []
    encode = make_encoder(tokenizer, root=root, max_length=max_length)
    train = Samples(encode(table.texts), target_of(table.labels, names, task))
    data = DataSet(
        train=train,
        test=Samples(encode(held.texts), target_of(held.labels, names, task)),
        classes=max(len(names), 1),
        loss=LOSSES[task],
        metrics=tuple(metrics or METRICS[task]),
        columns={"label": train.target.numpy()} if names else {},
        sample_shape=(),
        info={"source": file, "rows_dropped": dropped} | ({"classes": names} if names else {}),
    )
    if table.clients is None:
        return data
    owners: Column = np.array(table.clients)
    columns_ = {str(client): owners, "client": owners} | data.columns
    return replace(data, columns=columns_, held_by="client" if test_by_client else None)


def _clean(
    columns: list[list[str]], texts: int, values: Sequence[str] | None
) -> tuple[_Table, int]:
    """Leave out rows with an empty text (counted) or with a label that is not asked for."""
    labels = columns[texts]
    table = _Table(columns[:texts], labels, columns[texts + 1] if columns[texts + 1 :] else None)
    wanted = None if values is None else {str(value) for value in values}
    asked = [row for row, name in enumerate(labels) if wanted is None or name in wanted]
    filled = [row for row in asked if all(column[row].strip() for column in table.texts)]
    if not filled:
        raise DataError(
            f"no usable row among {len(labels)}: check data.text, data.label and data.values"
        )
    return table.rows(filled), len(asked) - len(filled)


def _split(
    table: _Table, test: float, by_client: bool, split_seed: int, task: str
) -> tuple[_Table, _Table]:
    """Hold out rows (stratified by class) or whole clients."""
    check_fraction("data.test", test)
    rng = generator(split_seed, "split", "test")
    rows = len(table.labels)
    if by_client:
        kept, held = split_owners(np.array(table.clients), test, rng)
    else:
        labels = np.array(table.labels) if task == "classification" else None
        kept, held = split_rows(rows, test, rng, labels)
    if not len(kept) or not len(held):
        raise ConfigError(
            f"data.test={test} of {rows} rows leaves {len(kept)} to train on and {len(held)} to "
            "test on: choose another fraction"
        )
    return table.rows(kept), table.rows(held)


def _subsample(table: _Table, rows: int, split_seed: int) -> _Table:
    """Draw training rows, which stay in their order."""
    check_count("data.subsample", rows)
    if rows > len(table.labels):
        raise ConfigError(
            f"data.subsample={rows}, but there are {len(table.labels)} training rows; leave it out"
        )
    drawn = generator(split_seed, "split", "subsample").permutation(len(table.labels))[:rows]
    return table.rows(np.sort(drawn))
