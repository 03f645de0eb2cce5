"""Federated evaluation data: a held-out share of each client's samples, chosen by its id.

Each client's samples are shuffled, keyed by the seed and its id. The first ones are its test
samples, the next are for validation if requested, and it trains on the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from fedraclora.data.clients import ClientData, PartitionedData
from fedraclora.data.dataset import DataSet, keep_rows
from fedraclora.data.entries import picked
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.rng import cohort_permutations, hash_key

AT_ONCE = 256  # clients whose rows are looked up together
ROW = "row of the source"  # prefix of such columns of a data set
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class ClientSplit(ClientData):
    """Part of each client's samples, as client data.

    Attributes:
        whole: All samples of all clients.
        share: Fraction of each client's samples to hold out for one use.
        seed: The seed of the run.
        held: Whether this is the held-out part or the rest.
        split: The use: test, or validation, which is held out beside the test.
        own_tests: Whether a client that brings test samples measures on those, and trains on all
            others.
    """

    whole: ClientData
    share: float
    seed: int
    held: bool
    split: str = "test"
    own_tests: bool = False
    _last: list[Rows] = field(default_factory=list, repr=False, compare=False)

    @property
    @override
    def num_clients(self) -> int:
        return self.whole.num_clients

    @override
    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Count the samples of each client: int64 [K]; 0 if none can be held out."""
        first, end = self._bounds(clients)
        return end - first

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        if self.held and (own := self.tests(int(clients[0]))) is not None:  # one at a time
            return own.take(positions[0])
        return self.whole.gather(clients, self.places(clients, positions))

    @override
    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        shape = positions.shape
        found = self.whole.lengths(clients, self.places(clients, positions.flatten(1)))
        return None if found is None else found.reshape(shape)

    @override
    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ClientSplit:
        return replace(self, whole=self.whole.to(device, dtype), _last=[])

    @property
    @override
    def folder(self) -> Path | None:
        return self.whole.folder

    @property
    @override
    def elsewhere(self) -> bool:
        return self.whole.elsewhere

    @property
    @override
    def brings_objects(self) -> bool:
        return self.whole.brings_objects

    @override
    def object_of(self, client: int) -> Any:
        """Return the samples of one client in the form that its owner gave."""
        ids = torch.tensor([client])
        places = self.places(ids, torch.arange(int(self.sizes(ids)))[None])
        return picked(self.whole.object_of(client), places[0].numpy())

    @property
    @override
    def brings_tests(self) -> bool:
        return self.own_tests and self.whole.brings_tests

    @override
    def tests(self, client: int) -> Samples | None:
        """Return the test samples that a client brings, used instead of a held-out share."""
        return self.whole.tests(client) if self.own_tests else None

    def places(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Map positions in the part to positions in the client: int64 [K, b], both.

        Padded positions may point past the part; the caller masks them.
        """
        if not self._last or not torch.equal(self._last[0][0][: len(clients)], clients):
            key, sizes = hash_key(self.seed, "held out"), self.whole.sizes(clients)
            order = cohort_permutations(key, clients, sizes, 0)
            self._last[:] = [(clients, self._bounds(clients)[0], order)]
        # The first ones remain for training.
        _, first, order = (each[: len(clients)] for each in self._last[0])
        return order.gather(1, (first[:, None] + positions).clamp(max=order.shape[1] - 1))

    def _bounds(self, clients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the bounds of the part in the order of each client, int64 [K] each."""
        sizes = self.whole.sizes(clients)
        tests = torch.full_like(sizes, -1)  # without tests of its own
        if self.brings_tests:
            own = map(self.tests, clients.tolist())
            tests = sizes.new_tensor([-1 if each is None else len(each) for each in own])
        wanted = (sizes.double() * self.share + 0.5).long().masked_fill(tests >= 0, 0)
        first, end = torch.zeros_like(sizes), wanted.minimum(sizes - 1).clamp(min=0)
        if self.split != "test":  # at least one remains to train on
            first, end = end, (end + wanted).minimum(sizes - 1).clamp(min=0)
        return (first, torch.where(tests < 0, end, tests)) if self.held else (end, sizes)


def hold_out_of_clients(
    data: ClientData,
    share: float | None,
    seed: int,
    split: str = "test",
    *,
    own_tests: bool = False,
) -> tuple[ClientData, ClientData | None]:
    """Split each client's samples into training and evaluation samples.

    Args:
        data: Of all clients. Not modified.
        share: Fraction of each client's samples, in (0, 1), rounded to the nearest count; each
            client keeps one to train on. None: nothing is held out.
        seed: Of the run.
        split: As in `ClientSplit`.
        own_tests: The same.

    Returns:
        Both, over the same samples. A client's parts depend on the seed, its id and its number of
        samples only.

    Raises:
        ConfigError: If no client can hold any out.
    """
    if share is None:
        return data, None
    if data.opaque:
        raise ConfigError(
            "evaluate.clients is set, but the clients' samples are objects without tensors, "
            "which cannot be evaluated. Set evaluate.clients=none."
        )
    parts = tuple(ClientSplit(data, share, seed, held, split, own_tests) for held in (False, True))
    train, held = (_rows_of(data, p) for p in parts) if isinstance(data, PartitionedData) else parts
    if held.table is not None and not len(held.table[1]):
        raise ConfigError(
            f"evaluate.share={share}: even the largest client would hold out no sample. Raise it."
        )
    return train, held


def _rows_of(data: PartitionedData, part: ClientSplit) -> PartitionedData:
    """Look up the rows of a part once, so that it costs no more than other divisions.

    Clients' own test samples become further rows of the table.
    """
    sizes = part.sizes(torch.arange(data.num_clients))
    table, test_rows = data.samples, torch.zeros(0)
    if part.held and part.brings_tests:
        tests = data.own_tests
        own = torch.tensor([len(each or ()) for each in tests])
        first = len(table) + own.cumsum(0) - own
        test_rows = first.masked_fill(own == 0, -1)
        table = Samples.join([table, *(each for each in tests if each)])
    found = []
    for ids in torch.arange(data.num_clients).split(AT_ONCE):
        place = torch.arange(int(sizes[ids].max())).expand(len(ids), -1)
        rows = data.rows_at(ids, part.places(ids, place))
        if len(test_rows):
            rows = torch.where(test_rows[ids, None] < 0, rows, test_rows[ids, None] + place)
        rows = rows.masked_fill(place >= sizes[ids, None], len(table)).sort(dim=1).values
        found.append(rows[rows < len(table)])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    entries = None if part.held else data.entries
    return PartitionedData(table, torch.cat(found), offsets, entries)


def numbered(data: DataSet) -> DataSet:
    """Number the training rows of a data set, for `without_held`."""
    return replace(data, columns=data.columns | {ROW: np.arange(len(data.train))})


def without_held(whole: DataSet, data: DataSet, held: ClientData | None) -> DataSet:
    """Remove the clients' held-out samples from a data set, so that pretraining cannot use them.

    Args:
        whole: The data set from `numbered`.
        data: The same after selections of rows.
        held: Rows of ``data`` that clients hold out; clients that are created or read on demand
            have other samples than the table.
    """
    if held is None or held.table is None:
        return whole
    _, rows_held = held.table
    # otherwise clients brought their own tests
    rows = rows_held[rows_held < len(data.train)].numpy()
    return keep_rows(whole, np.setdiff1d(whole.columns[ROW], data.columns[ROW][rows]))
