"""Text in tables: sentences, or pairs of them, with a label and a natural client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedraclora.data.dataset import SHARE, DataSet, divide
from fedraclora.data.labels import Kind, classes_of, supervised, target_of
from fedraclora.data.locate import check_file, resolve
from fedraclora.data.samples import Samples
from fedraclora.data.table import Named, read_columns
from fedraclora.data.tokens import make_encoder, require_tokenizer
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import Count, Fraction, limited
from fedraclora.rng import generator

# Rows of a table: one column or two of text, the label and, where it is asked for, the client.
Table = npt.NDArray[Any]


@limited("data")
def load_text(
    *,
    file: str,
    text: str | int | Sequence[str | int],
    label: str | int,
    tokenizer: str | None,
    root: str | None = None,
    test_file: str | None = None,
    client: str | int | None = None,
    header: bool = True,
    task: Kind = "classification",
    values: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    max_length: Count = 128,
    test: Fraction = SHARE,
    test_by_client: bool = False,
    split_seed: int = 0,
    subsample: Count | None = None,
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
            ``transformers.AutoTokenizer``; only the last may download. None is refused.
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
    columns = [text] if isinstance(text, str | int) else list(text)
    if len(columns) not in {1, 2}:
        raise ConfigError(f"data.text={columns}: one column, or two for pairs of texts, is wanted")
    if test_by_client and (test_file or client is None):
        raise ConfigError("data.test_by_client=true needs data.client, and data.test_file=null")
    named: list[Named] = [("data.text", column) for column in columns] + [("data.label", label)]

    count = len(columns)

    def read(
        spelling: str, key: str, pin: str | None, more: list[Named]
    ) -> tuple[Table, int, list[str]]:
        path = check_file(resolve(spelling, key=key, root=root), pin)
        columns = read_columns(path, named + more, header=header)
        rows, dropped = _clean(columns, count, values)
        _refuse_gaps(rows, count, [label, client], path)
        return rows, dropped, columns[-1]

    owner: list[Named] = [] if client is None else [("data.client", client)]
    table, dropped, everyone = read(file, "data.file", sha256, owner)
    if test_file:
        held_out, dropped_test, _ = read(test_file, "data.test_file", test_sha256, [])
        dropped += dropped_test
    else:
        rng = generator(split_seed, "split", "test")
        strata = np.array(table[:, count].tolist()) if task == "classification" else None
        owners = np.array(table[:, -1].tolist()) if test_by_client else None
        rows, others = divide("data.test", test, len(table), rng, labels=strata, owners=owners)
        table, held_out = table[rows], table[others]
    if subsample is not None:
        if subsample > len(table):
            raise ConfigError(
                f"data.subsample={subsample}, but there are {len(table)} training rows; leave it "
                "out"
            )
        drawn = generator(split_seed, "split", "subsample").permutation(len(table))[:subsample]
        table = table[np.sort(drawn)]
    names = classes_of(table[:, count].tolist(), str(label), task, file, values)
    encode = make_encoder(require_tokenizer(tokenizer), root=root, max_length=max_length)
    train, tested = (
        Samples(encode(part[:, :count].T.tolist()), target_of(part[:, count].tolist(), names, task))
        for part in (table, held_out)
    )
    data = supervised(
        train,
        tested,
        names,
        task,
        metrics=metrics,
        owners=None if client is None else np.array(table[:, -1].tolist()),
        clients=None if client is None else np.array(everyone),
        client=str(client),
        info={"source": file, "rows_dropped": dropped},
        reading={"tokenizer": tokenizer, "max_length": max_length},
    )
    return replace(data, held_out_by="client" if test_by_client else None)


def _refuse_gaps(table: Table, texts: int, names: Sequence[str | int | None], path: Path) -> None:
    """Refuse labels and owners that are empty: each would be a class, or a client, of its own."""
    for column, name in zip(table[:, texts:].T, names, strict=False):  # test rows have no owner
        if empty := sum(not value.strip() for value in column):
            raise DataError(
                f"{path}: the column {name} is empty in {empty} rows: fill them in, or leave the "
                "rows out"
            )


def _clean(columns: list[list[str]], texts: int, values: Sequence[str] | None) -> tuple[Table, int]:
    """Leave out rows with an empty text (counted) or with a label that is not asked for."""
    allowed = None if values is None else {str(value) for value in values}
    asked = [row for row in zip(*columns, strict=True) if allowed is None or row[texts] in allowed]
    filled = [row for row in asked if all(text.strip() for text in row[:texts])]
    if not filled:
        raise DataError(
            f"no usable row among {len(columns[0])}: check data.text, data.label and data.values"
        )
    return np.array(filled, dtype=object), len(asked) - len(filled)
