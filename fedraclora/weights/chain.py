"""Keep the sequence of merges, and compute what an absent client must fetch to catch up.

A client with version v of the base needs the merges v+1..t, or the full weight with the tensors
kept beside it, whichever is smaller, decided per weight. Every client is assumed to have version 0,
the initial weights (a public checkpoint, or a seed).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.codec import join, split
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.factor import past_name, pasts, weight_of
from fedraclora.protocol.link import Move
from fedraclora.protocol.method import Link, Plan, Term
from fedraclora.protocol.quantized import FULL, sent_bytes
from fedraclora.tree import Tree


def term_bytes(term: Term, coding: str = NONE) -> int:
    """Return the payload bytes of a term: its matrices, coefficients, and 8 for each seed."""
    numbers = [f.numbers for f in term.factors if f.numbers is not None]
    exact = sum(f.exact_bytes for f in term.factors)
    return exact + sum(value_bytes(tensor, term.kind, coding) for tensor in numbers)


def value_bytes(value: torch.Tensor, kind: str, coding: str = NONE) -> int:
    """Return the payload bytes of a new value."""
    return value.nbytes if kind == FULL else sent_bytes([value], kind, coding)


class LinkSizes:
    """Count the bytes of merges by weight, to find what a client at an old version needs.

    For each weight that is the merges since then, or the full weight if these are not smaller. So
    there is a version, the floor, such that all clients at it or below need the same: for each
    weight there are no merges up to the floor, or the merges after it are not smaller than the
    weight. With new versions the floor rises, and older entries are dropped, so that neither memory
    nor the cost of a round grows with the number of rounds.

    The factor that the last merge trained for a weight (`fedraclora.protocol.factor`) is part of
    its terms; a client that fetches the full weight receives it, too, and its bytes are counted.

    Weights that a move changes together are merged or fetched together.

    Sizes are compared without coding, so that no decision depends on the version of a coder. If
    bytes are coded, counts have two rows: without and with coding.

    Args:
        base: The weights at version 0.
        coding: Coding of quantized numbers (`fedraclora.protocol.coding`).

    Attributes:
        dense: Bytes of each full weight at present [1 or 2, W].
        beside: Bytes of the factor that the last merge trained for it, and the next may need
            [1 or 2, W].
        floor: The version up to which all clients need the same.
        kinds: Number formats of full weights, by name; others are not quantized.
        sums: For each version from the floor on, the bytes of all merges up to it [1 or 2, W].
    """

    def __init__(self, base: Mapping[str, torch.Tensor], coding: str = NONE) -> None:
        self.place = {name: i for i, name in enumerate(n for n in base if weight_of(n) is None)}
        self.codings = (NONE,) if coding == NONE else (NONE, coding)
        whole = [[base[name].nbytes for name in self.place]] * len(self.codings)
        self.dense = np.array(whole, np.int64)
        self.beside = np.zeros_like(self.dense)
        for weight, past in pasts(base).items():
            self.beside[:, self.place[weight]] = past.nbytes
        self.kinds: dict[str, str] = {}
        self.floor, self.sums = 0, [np.zeros_like(self.dense)]

    @property
    def whole(self) -> npt.NDArray[np.int64]:
        """Return the bytes of each full weight [1 or 2, W]."""
        found: npt.NDArray[np.int64] = self.dense + self.beside
        return found

    @property
    def version(self) -> int:
        """Return the version of the server's base: the number of merges."""
        return self.floor + len(self.sums) - 1

    def add(self, link: Link | None) -> None:
        """Append the merge of a round (None: no change, but a new version)."""
        row = np.zeros_like(self.dense)
        for part in () if link is None else link.parts():
            for name, term in part.terms.items():
                row[:, self.place[name]] += [term_bytes(term, each) for each in self.codings]
                if term.kept is not None:
                    self._stays(past_name(name), term.kept, term.kind)
            for name, value in part.dense.items():
                row[:, self.place[weight_of(name) or name]] += self._stays(name, value, part.kind)
            for move in part.moves:
                row[:, self._together(move)] += move.payload_bytes
        self.sums.append(self.sums[-1] + row)
        # If a weight changes its size, the full weight is in a merge of the same size, so a floor
        # remains one.
        while len(self.sums) > 1 and self._is_floor(self.sums[1]):
            del self.sums[0]
            self.floor += 1

    def _together(self, move: Move) -> int:
        """Count weights that share the numbers of a move as one; return its index."""
        places = sorted({self.place[name] for name in move.names})
        for sizes in (self.dense, self.beside, *self.sums):
            sizes[:, places[0]] = sizes[:, places].sum(1)
            sizes[:, places[1:]] = 0
        self.place |= dict.fromkeys(move.names, places[0])
        if move.keeps_direction:
            self.beside[:, places[0]] = self.dense[:, places[0]]
        return places[0]

    def _stays(self, name: str, value: torch.Tensor, kind: str) -> list[int]:
        """Set the size of a new value, or of a tensor beside a weight; return it."""
        weight = weight_of(name)
        size = [value_bytes(value, kind, coding) for coding in self.codings]
        (self.dense if weight is None else self.beside)[:, self.place[weight or name]] = size
        if kind != FULL:
            self.kinds[name] = kind
        return size

    def _is_floor(self, until: npt.NDArray[np.int64]) -> bool:
        """Check whether older versions need the same as this one, given the bytes up to it."""
        return bool(((self.sums[-1] - until >= self.whole) | (until == 0))[0].all())

    def since(self, version: int) -> npt.NDArray[np.int64]:
        """Return the bytes of the merges after a version, or the floor below it [1 or 2, W]."""
        after: npt.NDArray[np.int64] = self.sums[-1] - self.sums[max(version - self.floor, 0)]
        return after

    def followed(self, version: int) -> frozenset[str]:
        """Return the weights that cost fewer bytes as merges than whole, from a version on.

        Returns:
            These, and the names of the factors of the last merge that are kept beside them.
        """
        smaller = (self.since(version) < self.whole)[0]
        found = [name for name, i in self.place.items() if smaller[i]]
        beside = [past_name(name) for name in found if self.beside[0, self.place[name]]]
        return frozenset([*found, *beside])


class CatchUp(LinkSizes):
    """Count the bytes that each client must fetch before it can take part.

    They equal those of the `fedraclora.weights.update.WeightUpdate` that a client on its own
    machine receives. Four bytes are stored per client, its version. A round accesses only its own
    clients, and a checkpoint contains the clients above the floor.

    Args:
        base: The initial weights (their sizes bound what a weight can cost).
        num_clients: Size of the population.
        coding: As in `LinkSizes`.
    """

    def __init__(
        self, base: Mapping[str, torch.Tensor], num_clients: int, coding: str = NONE
    ) -> None:
        super().__init__(base, coding)
        self.versions: npt.NDArray[np.int32] = np.zeros(num_clients, np.int32)

    def missing(self, clients: torch.Tensor, *, coded: bool = True) -> npt.NDArray[np.int64]:
        """Count the bytes that each client needs to be up to date [K], with coding if used."""
        if not len(clients):
            return np.zeros(0, dtype=np.int64)
        versions = np.maximum(self.versions[clients.numpy()], self.floor)
        if (versions == versions[0]).all():  # as if all clients are asked in every round
            return np.full(len(versions), self._missing(versions[0], coded))
        present, inverse = np.unique(versions, return_inverse=True)
        return np.array([self._missing(version, coded) for version in present], np.int64)[inverse]

    def _missing(self, version: int, coded: bool) -> int:
        links = self.since(version)
        each = np.where((links < self.whole)[0], links, self.whole)
        return int(each[-1 if coded else 0].sum())

    def fetch(self, clients: torch.Tensor) -> npt.NDArray[np.int64]:
        """Update clients to the current version; return the bytes that each of them fetched [K]."""
        cost = self.missing(clients)
        self.versions[clients.numpy()] = self.version
        return cost

    def state(self) -> Tree:
        """Return tensors for a checkpoint; clients at the floor or below restart from version 0."""
        seen = np.flatnonzero(self.versions)  # no array of the population is created
        above = self.versions[seen] > self.floor
        self.versions[seen[~above]] = 0
        seen = seen[above]
        return {
            "catch_up/floor": torch.tensor([self.floor]),
            "catch_up/sums": torch.from_numpy(np.stack(self.sums).reshape(len(self.sums), -1)),
            "catch_up/dense": torch.from_numpy(self.dense.reshape(-1)),
            "catch_up/beside": torch.from_numpy(self.beside.reshape(-1)),
            "catch_up/clients": torch.from_numpy(seen),
            "catch_up/versions": torch.from_numpy(self.versions[seen]),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors of `state`."""
        self.floor = int(tensors["catch_up/floor"])
        shape = self.dense.shape
        self.sums = list(tensors["catch_up/sums"].numpy().copy().reshape(-1, *shape))
        self.dense = tensors["catch_up/dense"].numpy().copy().reshape(shape)
        self.beside = tensors["catch_up/beside"].numpy().copy().reshape(shape)
        self.versions = np.zeros_like(self.versions)
        self.versions[tensors["catch_up/clients"].numpy()] = tensors["catch_up/versions"].numpy()


def link_tensors(link: Link) -> tuple[Tree, dict[str, object]]:
    """Convert a merge to tensors and plain JSON, for a file."""
    tensors, plain = split(link, "link")
    return tensors, {"link": plain}


def read_link(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> Link:
    """Rebuild a merge from `link_tensors`."""
    return join(Link, tensors, meta["link"], "link")


def plan_meta(plan: Plan) -> dict[str, object]:
    """Describe a plan in plain JSON."""
    found: dict[str, object] = split(plan)[1]
    return found


def read_plan(meta: Mapping[str, Any]) -> Plan:
    """Rebuild a plan from `plan_meta`."""
    return join(Plan, {}, meta)
