"""Tokenize the texts of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.dataset import EncodedSamples, RowNumbers
from fedraclora.data.encoders.labels import target_of
from fedraclora.data.locate import load_tokenizer
from fedraclora.data.samples import Samples
from fedraclora.data.tables import Table
from fedraclora.errors import DataError

# Rows of a table: one or two columns of text, the label and, if requested, the client.
TextRows = npt.NDArray[Any]
Cleaned = tuple[TextRows, RowNumbers, int]


@dataclass(frozen=True)
class TextReader:
    """Read texts as a run read its own file; see `fedraclora.data.dataset.SampleReader`.

    Attributes:
        text, label, header, task, values, tokenizer, root, max_length: As in `load_text`.
    """

    text: tuple[str | int, ...]
    label: str | int
    header: bool
    task: str
    values: Sequence[str] | None
    tokenizer: str | None
    root: str | None
    max_length: int

    def __call__(
        self, found: Any, reading: Mapping[str, Any], *, target: bool = True
    ) -> EncodedSamples:
        """Read a file, a frame with its columns, or a list of texts (or of pairs of them)."""
        table, kept, _ = self.rows(found, target=target)
        names = [*map(str, reading.get("classes", []))] if target else None
        return EncodedSamples(self.samples(table[kept], names), kept, len(table))

    def rows(self, found: Any, *, owner: str | int | None = None, target: bool = True) -> Cleaned:
        """Return texts, labels if needed, and owners if they have a column.

        Returns:
            All rows; which of them have a text and a requested label; and how many with a requested
            label have no text.
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
        # An empty label or owner would become a class, or a client.
        for (_, name), column in zip(named[count:], table[rows, count:].T, strict=True):
            if empty := sum(not value.strip() for value in column):
                raise DataError(
                    f"{found if file else 'data'}: the column {name} is empty in {empty} rows: "
                    "fill them in, or leave the rows out"
                )
        dropped = int((asked & ~filled).sum())
        return table, rows, dropped

    def samples(self, table: TextRows, names: Sequence[str] | None) -> Samples:
        """Tokenize rows; ``names`` are the classes, None without targets."""
        count = len(self.text)
        wanted = torch.zeros(len(table))
        if names is not None:
            wanted = target_of(table[:, count].tolist(), names)
        # it needs at least one row
        texts = table[:, :count].T.tolist() if len(table) else [[""]] * count
        batch = self._tokenizer(
            *texts,
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids = {name: batch[name][: len(table)].to(torch.int64) for name in batch}
        return Samples(ids, wanted)

    def lengths(self, texts: Samples) -> dict[str, int]:
        """Count the texts that are as long as they may be, and may have been cut."""
        full = int((texts.inputs["attention_mask"].sum(dim=1) == self.max_length).sum())
        return {"max_length": self.max_length, "full": full, "texts": len(texts)}

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
    """Read columns of a file or a frame, or a list of texts."""
    if isinstance(found, Path) or hasattr(found, "iloc"):
        file = isinstance(found, Path)
        table = Table.read(found, words=None, header=header) if file else Table.of(found, "data")
        return [table.texts(key, name) for key, name in named]
    plain = isinstance(found, list) and all(isinstance(row, str | tuple | list) for row in found)
    rows = [[row] if isinstance(row, str) else [*row] for row in found] if plain else []
    if not rows or len(named) > texts or any(len(row) != texts for row in rows):
        raise DataError(
            f"data is a {type(found).__name__}. Give a file or a frame with the columns "
            f"{[name for _, name in named]}"
            + ("" if len(named) > texts else f", or a list with {texts} text(s) a row")
        )
    return [[str(row[place]) for row in rows] for place in range(texts)]
