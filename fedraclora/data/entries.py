"""Keep the clients' objects beside the table made from them.

A user's training function receives its client's object: the entry itself if all of it is for
training, else an object of the same kind with the training rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.samples import Samples
from fedraclora.errors import DataError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entries:
    """Hold objects of a program, and which of their rows are in a table.

    Attributes:
        objects: One for each client, or one that is divided.
        starts: The first row of each object among the rows of all, and the end, int64.
        rows: For each row of the table, its number among these rows, int64.
    """

    objects: Sequence[Any]
    starts: Rows
    rows: Rows

    @classmethod
    def of(cls, objects: Sequence[Any], sizes: Sequence[int]) -> Entries:
        """Build from objects whose rows are a table, one after another."""
        starts = np.cumsum([0, *sizes])
        return cls(objects, starts, np.arange(starts[-1]))

    def keep(self, rows: Rows) -> Entries:
        """Keep some rows, as in the table."""
        return replace(self, rows=self.rows[rows])

    def of_rows(self, rows: Rows) -> Any:
        """Return the object with these rows of the table: an entry, or part of one."""
        rows = self.rows[rows]
        place = int(np.searchsorted(self.starts, rows[0], side="right")) - 1
        own, first, end = self.objects[place], self.starts[place], self.starts[place + 1]
        return own if np.array_equal(rows, np.arange(first, end)) else picked(own, rows - first)


def picked(found: Any, rows: Rows) -> Any:
    """Select rows of samples, in their original form.

    Example:
        >>> picked((["a", "b", "c"], np.array([1, 2, 3])), np.array([0, 2]))
        (['a', 'c'], array([1, 3]))
    """
    if isinstance(found, Samples):
        return found.take(torch.from_numpy(rows))
    if hasattr(found, "select") and hasattr(found, "column_names"):  # of Hugging Face
        return found.select(rows)
    if isinstance(found, torch.utils.data.Dataset):
        return torch.utils.data.Subset(found, rows.tolist())
    if isinstance(found, tuple | list):
        inputs, target = found
        return type(found)((_columns(inputs, rows), _rows(target, rows)))
    return _columns(found, rows)


def _columns(found: Any, rows: Rows) -> Any:
    if isinstance(found, Mapping):
        return {name: _rows(column, rows) for name, column in found.items()}
    return _rows(found, rows)


def _rows(found: Any, rows: Rows) -> Any:
    if isinstance(found, torch.Tensor):
        return found[torch.from_numpy(rows).to(found.device)]
    return [found[row] for row in rows] if isinstance(found, list | tuple) else found[rows]


def parts_of(found: Any) -> tuple[Any, Any]:
    """Split a client's entry into its training samples and its own test samples, if any."""
    both = isinstance(found, Mapping) and {*found} == {"train", "test"}
    return (found["train"], found["test"]) if both else (found, None)


def length(found: Any) -> int:
    """Count the samples of an object; an object without a length is one sample.

    A dict has columns, a pair inputs and a target: they have one length.

    Raises:
        DataError: If they have several.
    """
    if not isinstance(found, Mapping | tuple):
        return len(found) if hasattr(found, "__len__") else 1
    columns = dict(found) if isinstance(found, Mapping) else dict(enumerate(found))
    parts = {name: part for name, part in columns.items() if not isinstance(part, str)}
    sizes = {name: length(part) for name, part in parts.items() if hasattr(part, "__len__")}
    if len({*sizes.values()}) > 1:
        raise DataError(
            f"the columns of a {type(found).__name__} have {sizes} values, so the number of "
            "samples is unclear. Give columns of one length, or an object with __len__."
        )
    return next(iter(sizes.values()), 1)


def index_table(count: int) -> Samples:
    """Build a table without columns, with one row for each sample of an object."""
    return Samples({}, torch.zeros(count, dtype=torch.int64))
