"""Define the interface to the samples of all clients, and clients as rows of a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedraclora.data.entries import Entries
from fedraclora.data.samples import Samples, TensorContainer
from fedraclora.errors import DataError

COUNTED_AT_ONCE = 16  # clients


class ClientData(ABC):
    """The samples of all clients. Client ids are partition ids, 0..num_clients-1.

    A source implements the number of clients and access to samples by client and position. The
    other methods have defaults here, for samples that are created on demand; a source overrides
    them if it knows more. Other code does not check for subclasses.
    """

    @property
    @abstractmethod
    def num_clients(self) -> int:
        """Number of clients."""

    @abstractmethod
    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Count the samples of each client: int64 [K] for ids [K]."""

    @abstractmethod
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Return samples by position in the client: ids [K], positions [K, b] -> K * b rows.

        A padded position may point past the last sample of a client; the caller masks it.
        """

    @abstractmethod
    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Count tokens without padding: ids [K], positions [K, ...] -> int64 like ``positions``.

        None if samples are not padded: then batches are not trimmed.
        """

    @abstractmethod
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ClientData:
        """Move to a device; floating samples take ``dtype`` when given."""

    def examples(self, clients: torch.Tensor) -> torch.Tensor:
        """Count the samples that weight clients, before packing: int64 [K] for ids [K].

        Example:
            >>> places = torch.tensor([[0, 1, 0], [0, 1, 2], [0, 0, 0]])
            >>> table = Samples({"position_ids": places}, places)
            >>> data = PartitionedData.of(table, [np.array([0]), np.array([1, 2])])
            >>> data.sizes(torch.arange(2)), data.examples(torch.arange(2))
            (tensor([1, 2]), tensor([2, 4]))
        """
        return self.sizes(clients)

    def samples_of(self, clients: torch.Tensor) -> Samples:
        """Return all samples of clients in order: ids [K] -> sum of their sizes rows."""
        sizes = self.sizes(clients).tolist()
        places = (torch.arange(size, device=clients.device)[None] for size in sizes)
        taken = zip(clients.split(1), places, strict=True)
        return Samples.join([self.gather(*one) for one in taken])

    @property
    def table(self) -> tuple[Samples, torch.Tensor] | None:
        """Return the table of all samples, and its row numbers: int64, client after client.

        None if samples are created or read on demand.
        """
        return None

    @property
    def seen(self) -> list[Samples]:
        """Return the samples of single clients that were read so far."""
        return []

    @property
    def elsewhere(self) -> bool:
        """Return whether the samples are on other machines, and unknown here."""
        return False

    @property
    def folder(self) -> Path | None:
        """Return the folder of the clients' files; None if there is none."""
        return None

    @property
    def opaque(self) -> bool:
        """Return whether samples are objects without tensors, for a training function."""
        return False

    @property
    def brings_objects(self) -> bool:
        """Return whether clients have objects (`object_of`), with or without tensors."""
        return False

    def object_of(self, client: int) -> Any:
        """Return the samples of a client in the form that its owner gave.

        Raises:
            DataError: If they are tensors alone.
        """
        raise DataError(f"client {client} has tensors, not an object of its own")

    @property
    def brings_tests(self) -> bool:
        """Return whether clients may bring their own test samples."""
        return False

    def tests(self, client: int) -> Samples | None:  # noqa: ARG002  (an override uses it)
        """Return a client's own test samples; None if it has none."""
        return None


@dataclass(frozen=True)
class ChangedClients(ClientData):
    """Base of client data that change the results of other client data.

    Attributes:
        data: Of the same clients.
    """

    data: ClientData

    @property
    @override
    def num_clients(self) -> int:
        return self.data.num_clients

    @override
    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        return self.data.sizes(clients)

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        return self.data.gather(clients, positions)

    @override
    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        return self.data.lengths(clients, positions)

    @override
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        return replace(self, data=self.data.to(device, dtype))


@dataclass(frozen=True)
class TableRows(TensorContainer, ClientData):
    """Client data that are rows of one table."""

    samples: Samples

    @abstractmethod
    def rows_at(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Find rows of the table by position in the client: int64 like ``positions`` [K, ...]."""

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        return self.samples.take(self.rows_at(clients, positions).reshape(-1))

    @override
    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        lengths = self.samples.lengths
        return None if lengths is None else lengths[self.rows_at(clients, positions)]

    @override
    def examples(self, clients: torch.Tensor) -> torch.Tensor:
        sizes = self.sizes(clients)
        if (packed := self.samples.packed) is None:
            return sizes
        place = torch.arange(int(sizes.max()), device=sizes.device).expand(len(sizes), -1)
        return (packed[self.rows_at(clients, place)] * (place < sizes[:, None])).sum(dim=1)

    @override
    def samples_of(self, clients: torch.Tensor) -> Samples:
        sizes = self.sizes(clients)  # copied once
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        place = torch.arange(len(starts), device=sizes.device) - starts
        rows = self.rows_at(clients.repeat_interleave(sizes), place[:, None])
        return self.samples.take(rows[:, 0])


@dataclass(frozen=True)
class PartitionedData(TableRows):
    """Client data as one table and a row index per client, held as one vector with offsets.

    Attributes:
        rows: The rows of client 0, then of client 1, ...: int64 [total].
        offsets: Where each client's rows begin, and the end: int64 [num_clients + 1].
        entries: The clients' objects; None if there are none.
        own_tests: Each client's own test samples; empty if there are none.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    entries: Entries | None = None
    own_tests: Sequence[Samples | None] = ()

    @classmethod
    def of(
        cls,
        samples: Samples,
        parts: list[npt.NDArray[np.int64]],
        *,
        entries: Entries | None = None,
        own_tests: Sequence[Samples | None] = (),
    ) -> PartitionedData:
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
        moved = torch.from_numpy(rows), torch.from_numpy(offsets)
        return cls(samples, *moved, entries=entries, own_tests=own_tests)

    @property
    @override
    def num_clients(self) -> int:
        return int(self.offsets.shape[0]) - 1

    @override
    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        return self._sizes[clients]

    @cached_property
    def _sizes(self) -> torch.Tensor:
        return self.offsets.diff()

    @override
    def rows_at(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first = self.offsets[clients].reshape(-1, *[1] * (positions.dim() - 1))
        # A padded position may point past the last client; the caller masks its sample.
        return self.rows[(first + positions).clamp_(max=self.rows.shape[0] - 1)]

    @property
    @override
    def table(self) -> tuple[Samples, torch.Tensor]:
        return self.samples, self.rows

    @property
    @override
    def opaque(self) -> bool:
        return not self.samples.inputs

    @property
    @override
    def brings_objects(self) -> bool:
        return self.entries is not None

    @override
    def object_of(self, client: int) -> Any:
        if self.entries is None:
            return super().object_of(client)
        rows = self.rows[self.offsets[client] : self.offsets[client + 1]]
        return self.entries.of_rows(rows.cpu().numpy())

    @property
    @override
    def brings_tests(self) -> bool:
        return any(self.own_tests)

    @override
    def tests(self, client: int) -> Samples | None:
        return self.own_tests[client] if self.own_tests else None

    @property
    def parts(self) -> list[npt.NDArray[np.int64]]:
        """The rows of each client."""
        return np.split(self.rows.numpy(), self.offsets[1:-1].numpy())

    def client(self, client: int) -> Samples:
        """All samples of one client, in stored order."""
        return self.samples.take(self.rows[self.offsets[client] : self.offsets[client + 1]])


def count_labels(data: ClientData, clients: torch.Tensor, classes: int) -> npt.NDArray[np.int64]:
    """Count the samples of each class at some clients.

    Args:
        data: Client data whose targets are classes.
        clients: Ids, int64 [K].
        classes: Number of classes.

    Returns:
        Counts [K, classes]. Samples are read for a few clients at a time.
    """
    counts = torch.zeros(len(clients), classes, dtype=torch.int64)
    for start in range(0, len(clients), COUNTED_AT_ONCE):
        ids = clients[start : start + COUNTED_AT_ONCE]
        sizes = data.sizes(ids)[:, None]
        place = torch.arange(int(sizes.max()), device=ids.device).expand(len(ids), -1)
        target = data.gather(ids, place).target.reshape(place.shape)
        if bool(((target < 0) | (target >= classes))[place < sizes].any()):
            raise DataError(
                f"clients {ids.tolist()} have a label outside 0 to {classes - 1}: number the "
                "classes from 0, or set data.classes"
            )
        owner = torch.arange(len(ids), device=ids.device)[:, None]
        found = (owner * classes + target)[place < sizes].bincount(minlength=len(ids) * classes)
        counts[start : start + COUNTED_AT_ONCE] = found.reshape(-1, classes).cpu()
    return counts.numpy()
