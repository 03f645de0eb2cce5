"""Samples, their division among clients, and what clients brought beside the table made of it.

A training function of the user's gets its client's own object: the entry itself where all of it is
to train on, else the same kind of object with the rows that are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedraclora.errors import DataError

COUNTED_AT_ONCE = 16  # clients


@dataclass(frozen=True)
class Movable:
    """Something that holds tensors, by themselves, in dicts or in others of its kind."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move every tensor to a device; floating ones take ``dtype`` when given."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(each) for name, each in value.items()}
            if isinstance(value, torch.Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            return value.to(device, dtype) if isinstance(value, Movable) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Samples(Movable):
    """A table of samples held as tensors.

    ``inputs`` maps the model's argument names to tensors [N, ...]; the single name ``"x"`` is
    passed by position. ``target`` is [N] (classes, int64) or [N, ...] (regression, tokens).
    ``beside`` is what no model is given, [N, ...]: the answers that a question may have
    (`fedraclora.data.chat.padded`).
    """

    inputs: dict[str, torch.Tensor]
    target: torch.Tensor
    beside: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.target.shape[0])

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Put tables of the same inputs one after another."""
        names = parts[0].inputs
        inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in names}
        return cls(inputs, torch.cat([part.target for part in parts]))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Inputs by name, and the target as ``"target"``."""
        return self.inputs | {"target": self.target}

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Samples:
        """Change every tensor alike."""
        inputs, beside = (
            {n: change(t) for n, t in of.items()} for of in (self.inputs, self.beside)
        )
        return Samples(inputs, change(self.target), beside)

    def take(self, rows: torch.Tensor) -> Samples:
        """Select rows (int64 [n]) into a new table."""
        return self.mapped(lambda t: t.index_select(0, rows))

    @cached_property
    def lengths(self) -> torch.Tensor | None:
        """Length of each sample up to its last token that is no padding, int64 [N].

        Read off ``attention_mask`` [N, T]; None where there is none, since nothing then says what
        is padding.
        """
        mask = self.inputs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return None
        place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return (place * (mask != 0)).amax(dim=1)

    @cached_property
    def packed(self) -> torch.Tensor | None:
        """Conversations in each sample, int64 [N], each of which begins at position 0.

        Read off ``position_ids`` [N, T]; None where there are none: then a sample is one.
        """
        places = self.inputs.get("position_ids")
        return None if places is None else (places == 0).flatten(1).sum(dim=1).clamp(min=1)

    @property
    def padded(self) -> int:
        """Tokens of every sample with its padding; 0 where there is no ``attention_mask``."""
        mask = self.inputs.get("attention_mask")
        return 0 if mask is None or mask.dim() != 2 else mask.shape[1]

    def trim(self, length: int | None = None) -> Samples:
        """Cut every sample to its first ``length`` tokens (views, nothing is copied).

        None takes the longest of these samples, and waits for the device to know it.

        What the cut leaves out must be padding, or samples that the caller masks: then it changes
        no output but by rounding, since attention gives padding a weight of exactly zero.
        """
        whole = self.padded
        if length is None:
            length = 0 if self.lengths is None else int(self.lengths.max())
        if not 0 < length < whole:
            return self
        inputs = {
            k: v[:, :length] if v.dim() > 1 and v.shape[1] == whole else v
            for k, v in self.inputs.items()
        }
        tokens = self.target.dim() == 2 and self.target.shape[1] == whole
        tokens = tokens and not self.target.is_floating_point()
        return Samples(inputs, self.target[:, :length] if tokens else self.target, self.beside)

    def clone(self) -> Samples:
        """Copy into memory of torch's own, whose alignment is always the same.

        numpy's is not, and matrix products round by alignment: a metric could differ in its last
        digit from one process to the next.
        """
        return self.mapped(torch.clone)


class ClientData(Protocol):
    """The training data of all clients. Client ids are partition ids, 0..num_clients-1."""

    @property
    def num_clients(self) -> int:
        """Number of clients."""

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Number of samples of each client: int64 [K] for ids [K]."""

    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Take samples by position in the client: ids [K], positions [K, b] -> K * b rows."""

    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Tokens without padding: ids [K], positions [K, ...] -> int64 like ``positions``.

        None where samples are not padded: then batches are taken as they are.
        """

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ClientData:
        """Move to a device; floating samples take ``dtype`` when given."""


@dataclass(frozen=True)
class TableRows(Movable, ABC):
    """Client data that are rows of one table."""

    samples: Samples

    @abstractmethod
    def rows_at(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Find rows of the table by position in the client: int64 like ``positions`` [K, ...]."""

    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Take samples by position in the client: ids [K], positions [K, b] -> K * b rows."""
        return self.samples.take(self.rows_at(clients, positions).reshape(-1))

    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Tokens without padding: ids [K], positions [K, ...] -> int64 like ``positions``."""
        lengths = self.samples.lengths
        return None if lengths is None else lengths[self.rows_at(clients, positions)]


@dataclass(frozen=True)
class Partitioned(TableRows):
    """Client data as one table and a row index per client, held as one vector with offsets."""

    rows: torch.Tensor  # int64 [total], the rows of client 0, then of client 1, ...
    offsets: torch.Tensor  # int64 [num_clients + 1]

    @classmethod
    def of(cls, samples: Samples, parts: list[npt.NDArray[np.int64]]) -> Partitioned:
        """Build from one array of row numbers per client.

        Raises:
            DataError: If there are no clients or a row number lies outside the table.
        """
        if not parts:
            raise DataError("a partition needs at least one client")
        sizes = np.array([len(p) for p in parts], dtype=np.int64)
        rows = np.concatenate([np.asarray(p, dtype=np.int64) for p in parts])
        if rows.size and (rows.min() < 0 or rows.max() >= len(samples)):
            raise DataError(f"partition rows must lie in 0..{len(samples) - 1}")
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return cls(samples, torch.from_numpy(rows), torch.from_numpy(offsets))

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return int(self.offsets.shape[0]) - 1

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Number of samples of each client: int64 [K]."""
        return self._sizes[clients]

    @cached_property
    def _sizes(self) -> torch.Tensor:
        return self.offsets.diff()

    @override
    def rows_at(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first = self.offsets[clients].reshape(-1, *[1] * (positions.dim() - 1))
        # A padded position may point past the last client; its sample is masked by the caller.
        return self.rows[(first + positions).clamp_(max=self.rows.shape[0] - 1)]

    @property
    def parts(self) -> list[npt.NDArray[np.int64]]:
        """The rows of each client."""
        return np.split(self.rows.numpy(), self.offsets[1:-1].numpy())

    def client(self, client: int) -> Samples:
        """All samples of one client, in stored order."""
        return self.samples.take(self.rows[self.offsets[client] : self.offsets[client + 1]])


def count_examples(data: ClientData, clients: torch.Tensor) -> torch.Tensor:
    """Count what clients are weighted by, int64 [K] for ids [K]: samples, unpacked.

    Example:
        >>> places = torch.tensor([[0, 1, 0], [0, 1, 2], [0, 0, 0]])
        >>> table = Samples({"position_ids": places}, places)
        >>> data = Partitioned.of(table, [np.array([0]), np.array([1, 2])])
        >>> data.sizes(torch.arange(2)), count_examples(data, torch.arange(2))
        (tensor([1, 2]), tensor([2, 4]))
    """
    sizes = data.sizes(clients)
    if not isinstance(data, TableRows) or (packed := data.samples.packed) is None:
        return sizes
    place = torch.arange(int(sizes.max()), device=sizes.device).expand(len(sizes), -1)
    return (packed[data.rows_at(clients, place)] * (place < sizes[:, None])).sum(dim=1)


def count_labels(data: ClientData, clients: torch.Tensor, classes: int) -> npt.NDArray[np.int64]:
    """Count the samples of each class at some clients.

    Args:
        data: Client data whose targets are classes.
        clients: Ids, int64 [K].
        classes: Number of classes.

    Returns:
        Counts [K, classes]. Samples are looked at a few clients at a time.
    """
    counts = torch.zeros(len(clients), classes, dtype=torch.int64)
    for start in range(0, len(clients), COUNTED_AT_ONCE):
        ids = clients[start : start + COUNTED_AT_ONCE]
        sizes = data.sizes(ids)[:, None]
        place = torch.arange(int(sizes.max()), device=ids.device).expand(len(ids), -1)
        target = data.gather(ids, place).target.reshape(place.shape)
        if bool(((target < 0) | (target >= classes))[place < sizes].any()):
            raise DataError(
                f"a class of the clients {ids.tolist()} is none of 0 to {classes - 1}: number the "
                "classes from 0, or say how many there are (data.classes)"
            )
        owner = torch.arange(len(ids), device=ids.device)[:, None]
        found = (owner * classes + target)[place < sizes].bincount(minlength=len(ids) * classes)
        counts[start : start + COUNTED_AT_ONCE] = found.reshape(-1, classes).cpu()
    return counts.numpy()


Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Entries:
    """Objects of a program, and which of their rows a table has.

    Attributes:
        objects: One for each client, or one that is divided.
        starts: The row of all objects together where each begins, and the end, int64.
        rows: Of the table: which of these rows each is, int64.
    """

    objects: Sequence[Any]
    starts: Rows
    rows: Rows

    @classmethod
    def of(cls, objects: Sequence[Any], sizes: Sequence[int]) -> Entries:
        """Take objects whose rows are a table, one after another."""
        starts = np.cumsum([0, *sizes])
        return cls(objects, starts, np.arange(starts[-1]))

    def keep(self, rows: Rows) -> Entries:
        """Follow the table to some of its rows."""
        return replace(self, rows=self.rows[rows])

    def client_of(self, parts: Sequence[Rows], client: int) -> Any:
        """Return the object of a client: an entry, or some rows of one.

        Args:
            parts: The rows of the table that each client has.
            client: The id.
        """
        rows = self.rows[parts[client]]
        place = int(np.searchsorted(self.starts, rows[0], side="right")) - 1
        own, first, end = self.objects[place], self.starts[place], self.starts[place + 1]
        return own if np.array_equal(rows, np.arange(first, end)) else picked(own, rows - first)


def picked(found: Any, rows: Rows) -> Any:
    """Pick rows of samples, in their own form.

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
    """Part what a client brings into what is trained on, and a test of its own, if any."""
    both = isinstance(found, Mapping) and {*found} == {"train", "test"}
    return (found["train"], found["test"]) if both else (found, None)


def length(found: Any) -> int:
    """Count the samples of an object that no table holds; one that has no length is one.

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
            f"the columns of a {type(found).__name__} have {sizes} values, so that nothing says "
            "how many samples it is: give columns of one length, or an object with __len__"
        )
    return next(iter(sizes.values()), 1)


def stand_in(count: int) -> Samples:
    """Make a table without numbers, with a row for each sample of objects that no table holds."""
    return Samples({}, torch.zeros(count, dtype=torch.int64))
