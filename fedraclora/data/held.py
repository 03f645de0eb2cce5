"""Samples that each client measures on and never trains on: a share of its own, by its id alone.

A client's samples are put into an order that is drawn from the seed and its id. Its first ones are
for the test, the next for validation where that is asked for, and it trains on what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedraclora.data.dataset import DataSet, keep_rows
from fedraclora.data.own import Brought
from fedraclora.data.samples import ClientData, Partitioned, Samples, picked
from fedraclora.errors import ConfigError
from fedraclora.rng import cohort_permutations, hash_key
from fedraclora.trust import is_function

AT_ONCE = 256  # clients whose rows are looked up together
ROW = "row of the source"  # of the columns of a data set
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Portion:
    """A part of each client's samples, as data of clients.

    Attributes:
        whole: All samples of all clients.
        share: Of each client's samples, what is held out for one use.
        seed: Of the run.
        held: Whether this is what is held out; else it is the rest.
        split: What is measured on: test, or validation, which is held out beside the test.
        own_tests: Whether a client that brings test samples measures on those, and trains on all
            others.
        listed: Such samples of each client, where they are here.
    """

    whole: ClientData
    share: float
    seed: int
    held: bool
    split: str = "test"
    own_tests: bool = False
    listed: Sequence[Samples | None] = ()
    _last: list[Rows] = field(default_factory=list, repr=False, compare=False)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.whole.num_clients

    @property
    def source(self) -> str | None:
        """Where clients' samples are from, as `Brought` says it."""
        return self.whole.source if isinstance(self.whole, Brought) else None

    def own(self, client: int) -> Any:
        """Return the part of one client as its function gives it."""
        assert isinstance(self.whole, Brought)  # noqa: S101 - others have no source
        ids = torch.tensor([client])
        places = self.places(ids, torch.arange(int(self.sizes(ids)))[None])
        return picked(self.whole.own(client), places[0].numpy())

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Number of samples of each client: int64 [K]; 0 where nothing can be held out."""
        first, end = self._bounds(clients)
        return end - first

    def tests(self, client: int) -> Samples | None:
        """Return test samples that a client brings, which are measured on in place of a share."""
        if not self.own_tests:
            return None
        if isinstance(self.whole, Brought):
            return self.whole.tests(client)
        return self.listed[client] if self.listed else None

    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Take samples by position in the part: ids [K], positions [K, b] -> K * b rows."""
        if self.held and (own := self.tests(int(clients[0]))) is not None:  # one at a time
            return own.take(positions[0])
        return self.whole.gather(clients, self.places(clients, positions))

    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Tokens without padding, int64 like ``positions``; None where samples have no mask."""
        shape = positions.shape
        found = self.whole.lengths(clients, self.places(clients, positions.flatten(1)))
        return None if found is None else found.reshape(shape)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Portion:
        """Move to a device; floating samples take ``dtype`` when given."""
        return replace(self, whole=self.whole.to(device, dtype), _last=[])

    def places(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Find positions in the client of positions in the part: int64 [K, b], both.

        Padded positions may point past the part; the caller masks them.
        """
        if not self._last or not torch.equal(self._last[0][0][: len(clients)], clients):
            key, sizes = hash_key(self.seed, "held out"), self.whole.sizes(clients)
            order = cohort_permutations(key, clients, sizes, 0)
            self._last[:] = [(clients, self._bounds(clients)[0], order)]
        # Still training are the first of them.
        _, first, order = (each[: len(clients)] for each in self._last[0])
        return order.gather(1, (first[:, None] + positions).clamp(max=order.shape[1] - 1))

    def _bounds(self, clients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find where the part begins and ends in the order of each client, int64 [K] each."""
        sizes = self.whole.sizes(clients)
        tests = torch.full_like(sizes, -1)  # without tests of its own
        if self.own_tests and (self.listed or isinstance(self.whole, Brought)):
            own = map(self.tests, clients.tolist())
            tests = sizes.new_tensor([-1 if each is None else len(each) for each in own])
        wanted = (sizes.double() * self.share + 0.5).long().masked_fill(tests >= 0, 0)
        first, end = torch.zeros_like(sizes), wanted.minimum(sizes - 1).clamp(min=0)
        if self.split != "test":  # something is left to train on
            first, end = end, (end + wanted).minimum(sizes - 1).clamp(min=0)
        return (first, torch.where(tests < 0, end, tests)) if self.held else (end, sizes)


def hold_out_of_clients(
    data: ClientData, share: float | None, seed: int, split: str = "test", **tests: Any
) -> tuple[ClientData, ClientData | None]:
    """Part each client's samples into what it trains on and what it measures on.

    Args:
        data: Of all clients. Not modified.
        share: Of each client's samples, in (0, 1), rounded to the nearest count; each client keeps
            one to train on. None: nothing is held out.
        seed: Of the run.
        split: As in `Portion`.
        **tests: Its ``own_tests`` and ``listed``.

    Returns:
        Both, over the same samples. What a client has of each is a function of the seed, its id and
        the number of its samples.

    Raises:
        ConfigError: If no client can hold any out.
    """
    if share is None:
        return data, None
    if whole_objects(data):
        raise ConfigError(
            "evaluate.clients is set, but the clients' samples are objects that no tensors were "
            "made of, on which nobody can measure: set evaluate.clients=none"
        )
    parts = tuple(Portion(data, share, seed, held, split, **tests) for held in (False, True))
    train, held = (_rows_of(data, p) for p in parts) if isinstance(data, Partitioned) else parts
    if isinstance(held, Partitioned) and not len(held.rows):
        raise ConfigError(
            f"evaluate.share is {share}, of which the largest client holds no sample out: raise it"
        )
    return train, held


def files_of(data: ClientData) -> Brought | None:
    """Return the data of clients whose samples lie in a folder, of which they may be a part."""
    whole = data.whole if isinstance(data, Portion) else data
    if not isinstance(whole, Brought) or whole.source is None or is_function(whole.source):
        return None
    return whole


def whole_objects(data: ClientData) -> bool:
    """Check whether client data are objects that no tensors were made of."""
    if isinstance(data, Brought):
        return data.objects
    return isinstance(data, Partitioned) and not data.samples.inputs


def _rows_of(data: Partitioned, part: Portion) -> Partitioned:
    """Look the rows of a part up, so that they cost what those of any division cost.

    Test samples that clients brought become further rows of the table.
    """
    sizes = part.sizes(torch.arange(data.num_clients))
    table, brought = data.samples, torch.zeros(0)
    if part.held and part.own_tests and any(part.listed):
        own = torch.tensor([len(each or ()) for each in part.listed])
        first = len(table) + own.cumsum(0) - own
        brought = first.masked_fill(own == 0, -1)
        table = Samples.join([table, *(each for each in part.listed if each)])
    found = []
    for ids in torch.arange(data.num_clients).split(AT_ONCE):
        place = torch.arange(int(sizes[ids].max())).expand(len(ids), -1)
        rows = data.rows_at(ids, part.places(ids, place))
        if len(brought):
            rows = torch.where(brought[ids, None] < 0, rows, brought[ids, None] + place)
        rows = rows.masked_fill(place >= sizes[ids, None], len(table)).sort(dim=1).values
        found.append(rows[rows < len(table)])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return Partitioned(table, torch.cat(found), offsets)


def numbered(data: DataSet) -> DataSet:
    """Number the training rows of a data set, for `without_held`."""
    return replace(data, columns=data.columns | {ROW: np.arange(len(data.train))})


def without_held(whole: DataSet, data: DataSet, held: ClientData | None) -> DataSet:
    """Leave out of a data set what its clients hold out, so that no pretraining sees it.

    Args:
        whole: Of `numbered`.
        data: What has become of it: some of its rows.
        held: Rows of the latter that clients hold out; clients that are made or found on demand
            have other samples than the table.
    """
    if not isinstance(held, Partitioned):
        return whole
    rows = held.rows[held.rows < len(data.train)].numpy()  # others are tests that clients brought
    return keep_rows(whole, np.setdiff1d(whole.columns[ROW], data.columns[ROW][rows]))
