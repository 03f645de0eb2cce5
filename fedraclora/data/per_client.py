"""Read samples that each client has itself, from files or a function.

The server knows the form of a sample, and may have samples to measure on. In a deployment all other
samples stay at their clients. The server trains on none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from fedraclora.binding import call_function
from fedraclora.data.clients import ClientData
from fedraclora.data.dataset import take
from fedraclora.data.encoders.array import (
    SampleSpec,
    describe_inputs,
    gathered,
    read_npz,
    scale_of_bytes,
)
from fedraclora.data.entries import index_table, length, parts_of, picked
from fedraclora.data.fingerprint import call_twice
from fedraclora.data.locate import user_path
from fedraclora.data.samples import Samples
from fedraclora.data.split import NO_HOLDOUT, Holdout
from fedraclora.errors import ConfigError, DataError
from fedraclora.trust import is_function

ONLY_FILE = "train.npz"  # the file of a single client's folder
PARAMETERS = "data.parameters"


def counted(samples: str | None, clients: int | None) -> int:
    """Return the number of clients; if it is not set, the number of files in a folder.

    Raises:
        ConfigError: If it is unknown.
        DataError: If the file numbers have a gap.
    """
    if clients is not None:
        return clients
    if samples is None or is_function(samples):
        raise ConfigError(
            "clients is not set: give the number of clients that have samples, for example "
            "clients=3"
        )
    numbers = _numbers(folder := _folder(samples))
    if not numbers:
        if (folder / ONLY_FILE).is_file():
            return 1
        raise DataError(
            f"data.samples={samples}: there is no file 0.npz, 1.npz, ... in this folder"
        )
    missing = sorted({*range(max(numbers) + 1)} - numbers)
    if missing:
        raise DataError(
            f"data.samples={samples}: there is {max(numbers)}.npz but no {missing[0]}.npz; clients "
            "are numbered from 0 without a gap"
        )
    return len(numbers)


def _folder(samples: str) -> Path:
    folder = user_path("data.samples", samples)
    if folder.is_file():
        raise DataError(
            f"data.samples={samples} is a file. Give a folder with 0.npz, 1.npz, ... or "
            "module:function; to divide a file among clients use data=table (CSV, Parquet) or "
            "data=arrays (.npz)."
        )
    return folder


def _numbers(folder: Path) -> set[int]:
    return {int(file.stem) for file in folder.glob("*.npz") if file.stem.isdecimal()}


def asked_of(
    source: str, client: int, parameters: Mapping[str, object] | None, *, twice: bool = False
) -> Any:
    """Call the function for a client's samples; arguments as in `read_own`."""
    call = partial(
        call_function, "data.samples", source, client, parameters=parameters, at=PARAMETERS
    )
    return call_twice(f"data.samples={source}, client {client}:", call) if twice else call()


def read_own(
    source: str,
    client: int,
    *,
    alone: bool = False,
    parameters: Mapping[str, object] | None = None,
    twice: bool = False,
) -> tuple[Samples, Samples | None]:
    """Read the samples of one client.

    Args:
        source: ``package.module:function``, which is called with the client's id; or a folder with
            ``<id>.npz``, or ``train.npz`` if it belongs to one client.
        client: The id.
        alone: Whether no other client can use the same folder.
        parameters: Further arguments of the function, by name.
        twice: Whether the function is called twice, and refused if the results differ.

    Returns:
        Its training samples; and its own test samples, if any: beside ``<id>.npz`` those of
        ``<id>.test.npz``, beside ``train.npz`` those of ``test.npz``, and from a function the entry
        ``test`` beside ``train``.

    Raises:
        DataError: If they are missing.
    """
    where = f"client {client} (data.samples={source})"
    if is_function(source):
        train, own = parts_of(asked_of(source, client, parameters, twice=twice))
        return gathered(train, where), None if own is None else gathered(own, f"{where}, test")
    folder = _folder(source)
    named, only = folder / f"{client}.npz", folder / ONLY_FILE
    file, beside = (named, f"{client}.test.npz") if named.is_file() else (only, "test.npz")
    if not file.is_file():
        raise DataError(f"{where} has no samples: neither {named} nor {only} is there")
    if file == only and (not alone or _numbers(folder)):
        raise DataError(
            f"{where} has no samples: {named} does not exist, and {only} is only read for a "
            "single client. With several clients give each its own file, 0.npz, 1.npz, ..."
        )
    found, test = read_npz(file, where), folder / beside
    return found, read_npz(test, f"{where}, test") if test.is_file() else None


@dataclass(frozen=True)
class PerClientSource(ClientData):
    """Read the samples of clients when they are needed.

    Attributes:
        source: A folder, or ``package.module:function``; None: they are on other machines.
        count: Size of the population.
        spec: The form of samples.
        only: The clients on this machine; None: all, if any.
        holdout: How each client's test samples are held out.
        parameters: Further arguments of the function, by name.
        device, dtype: Device, and type of floating samples; None: unchanged.
        objects: Whether the function returns objects for a user's training function.
        reading: How the numbers of the samples read so far were converted (`DataSet.reading`).
        facts: The same as text.
    """

    source: str | None
    count: int
    spec: SampleSpec
    only: Sequence[int] | None = None
    holdout: Holdout = NO_HOLDOUT
    parameters: Mapping[str, object] = field(default_factory=dict)
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    objects: bool = False
    reading: dict[str, object] = field(default_factory=dict, repr=False, compare=False)
    facts: dict[str, object] = field(default_factory=dict, repr=False, compare=False)
    _found: dict[int, Samples] = field(default_factory=dict, repr=False, compare=False)
    _held_out: dict[int, Samples] = field(default_factory=dict, repr=False, compare=False)
    _read: dict[int, Samples] = field(default_factory=dict, repr=False, compare=False)
    _tests: dict[int, Samples | None] = field(default_factory=dict, repr=False, compare=False)
    _own: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    @override
    def num_clients(self) -> int:
        return self.count

    def client(self, client: int) -> Samples:
        """Return the training samples of one client.

        Raises:
            ConfigError: If they are on another machine.
            DataError: If they are missing, or not what they should be.
        """
        if client not in self._found:
            whole = self.whole(client)
            self._read.pop(client, None)
            training, held_out = self.holdout.split_client(len(whole), client)
            found = take(whole, training) if len(held_out) else whole
            self._found[client] = found.to(self.device, self.dtype)
            if self.holdout.fraction and self.only is None:
                self._held_out[client] = take(whole, held_out)
        return self._found[client]

    @property
    @override
    def brings_objects(self) -> bool:
        return is_function(self.source or "")

    @override
    def object_of(self, client: int) -> Any:
        """Return the training samples of one client as its function returns them.

        Raises:
            DataError: If it fails.
        """
        if client not in self._own:
            twice = self.objects and not self._own
            found = asked_of(str(self.source), client, self.parameters, twice=twice)
            found = found if self.objects else parts_of(found)[0]
            size = length(found) if self.objects else len(self.whole(client))
            rows = self.holdout.split_client(size, client)[0]
            self._own[client] = found if len(rows) == size else picked(found, rows)
        return self._own[client]

    @property
    @override
    def brings_tests(self) -> bool:
        return True

    @override
    def tests(self, client: int) -> Samples | None:
        """Return a client's own test samples; None if it has none or is on another machine."""
        if self.source is None or (self.only is not None and client not in self.only):
            return None
        if client not in self._tests and not self.objects:
            self.whole(client)
        found = self._tests.get(client)
        return None if found is None else found.to(self.device, self.dtype)

    def held_out(self) -> Samples:
        """Return the held-out samples of all clients."""
        for client in range(self.num_clients):
            self.client(client)
        return Samples.join([self._held_out.pop(client) for client in range(self.num_clients)])

    @property
    @override
    def seen(self) -> list[Samples]:
        return [*self._found.values()]

    @property
    @override
    def elsewhere(self) -> bool:
        return self.source is None

    @property
    @override
    def folder(self) -> Path | None:
        there = self.source is not None and not is_function(self.source)
        return Path(str(self.source)) if there else None

    @property
    @override
    def opaque(self) -> bool:
        return self.objects

    def whole(self, client: int) -> Samples:
        """Return all samples of one client, read once."""
        if self.source is None:
            raise ConfigError(
                "data=own: the samples are at the clients. Run it with engine=deploy, or set "
                "data.samples to a folder or function with every client's samples."
            )
        if self.objects:
            return index_table(length(self.object_of(client)))
        if client not in self._read:
            alone, arguments = len(self.only or range(self.num_clients)) == 1, self.parameters
            twice = not self._tests  # the first client represents all
            found, test = read_own(
                self.source, client, alone=alone, parameters=arguments, twice=twice
            )
            self._read[client] = found
            where = f"client {client}, test (data.samples={self.source})"
            self._tests[client] = None if test is None else self.spec.validate(test, where)
        self.reading.update(scale_of_bytes(self._read[client]))
        where = f"client {client} (data.samples={self.source})"
        fitted = self.spec.validate(self._read[client], where)
        self.facts.update(describe_inputs(self._read[client], fitted))
        return fitted

    @override
    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Count the samples of each client: int64 [K]; 1 for those on other machines."""
        known = self.source is not None
        sizes = [
            len(self.client(c)) if known and (self.only is None or c in self.only) else 1
            for c in clients.tolist()
        ]
        return torch.tensor(sizes, dtype=torch.int64, device=clients.device)

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        taken = []
        for client, rows in zip(clients.tolist(), positions, strict=True):
            own = self.client(client)
            # A padded position may point past the last sample; the caller masks it.
            taken.append(own.take(rows.flatten().clamp(max=len(own) - 1)))
        return Samples.join(taken)

    @override
    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        found = []
        for client, rows in zip(clients.tolist(), positions, strict=True):
            own = self.client(client)
            if own.lengths is None:
                return None
            found.append(own.lengths[rows.clamp(max=len(own) - 1)])
        return torch.stack(found)

    @override
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PerClientSource:
        found = {client: samples.to(device, dtype) for client, samples in self._found.items()}
        return replace(self, device=device, dtype=dtype, _found=found)
