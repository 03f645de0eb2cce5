"""The sequence of merges, and what a client must fetch to catch up after an absence.

A client that holds version v of the base needs the links v+1..t, or the dense weight with what
stands beside it, whichever is smaller: decided per weight. Every client is taken to hold version 0,
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

    Of each weight that is the links since then, or the weight whole where these are not smaller.
    So there is a version, the floor, such that whoever holds it or an older one needs the same: of
    each weight the links up to it are none, or those after it are not smaller than the weight. As
    versions come the floor rises, and what lies below it is forgotten: what is kept, and what a
    round costs, does not grow with the rounds.

    What the last link trained of a weight (`fedraclora.protocol.factor`) comes with its terms; to
    whoever fetches the weight whole it is sent beside it, and is a part of what that costs.

    Weights that a move changes together are followed or fetched together.

    What is smaller is told by bytes without coding: so no choice, and no number that comes of it,
    depends on the version of a coder. Where bytes are coded, counts have two rows: without, with.

    Args:
        base: The weights at version 0.
        coding: Of what is in few bits (`fedraclora.protocol.coding`).

    Attributes:
        dense: Bytes of each weight as it is now, whole [1 or 2, W].
        beside: Bytes of what the last link trained of it, and the next may need [1 or 2, W].
        floor: The version up to which all need the same.
        kinds: In which weights travel whole, by name; those that are not here, as they are.
        sums: For each version from the floor on the bytes of all links up to it [1 or 2, W].
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
        """Return the bytes of each weight sent whole [1 or 2, W]."""
        found: npt.NDArray[np.int64] = self.dense + self.beside
        return found

    @property
    def version(self) -> int:
        """Return the version of the server's base: the number of merges."""
        return self.floor + len(self.sums) - 1

    def add(self, link: Link | None) -> None:
        """Append the merge of a round (None: no change, but the version advances)."""
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
        # A weight whose size changes comes whole in a link that is as large: a floor stays one.
        while len(self.sums) > 1 and self._is_floor(self.sums[1]):
            del self.sums[0]
            self.floor += 1

    def _together(self, move: Move) -> int:
        """Count weights that share the numbers of a move as one; return its place."""
        places = sorted({self.place[name] for name in move.names})
        for sizes in (self.dense, self.beside, *self.sums):
            sizes[:, places[0]] = sizes[:, places].sum(1)
            sizes[:, places[1:]] = 0
        self.place |= dict.fromkeys(move.names, places[0])
        if move.keeps_direction:
            self.beside[:, places[0]] = self.dense[:, places[0]]
        return places[0]

    def _stays(self, name: str, value: torch.Tensor, kind: str) -> list[int]:
        """Take over the size of a new value, or of what stands beside a weight; return it."""
        weight = weight_of(name)
        size = [value_bytes(value, kind, coding) for coding in self.codings]
        (self.dense if weight is None else self.beside)[:, self.place[weight or name]] = size
        if kind != FULL:
            self.kinds[name] = kind
        return size

    def _is_floor(self, until: npt.NDArray[np.int64]) -> bool:
        """Check whether older versions need what this one needs, given the bytes up to it."""
        return bool(((self.sums[-1] - until >= self.whole) | (until == 0))[0].all())

    def since(self, version: int) -> npt.NDArray[np.int64]:
        """Return the bytes of the merges after a version, or the floor below it [1 or 2, W]."""
        after: npt.NDArray[np.int64] = self.sums[-1] - self.sums[max(version - self.floor, 0)]
        return after

    def followed(self, version: int) -> frozenset[str]:
        """Return the weights that cost fewer bytes as merges than whole, from a version on.

        Returns:
            These, and the names of what the last link trained of them, where it stands beside them.
        """
        smaller = (self.since(version) < self.whole)[0]
        found = [name for name, i in self.place.items() if smaller[i]]
        beside = [past_name(name) for name in found if self.beside[0, self.place[name]]]
        return frozenset([*found, *beside])


class CatchUp(LinkSizes):
    """Count the bytes that each client must fetch before it can take part.

    They are those of the `fedraclora.weights.update.WeightUpdate` that a client of its own machine
    is sent. Four bytes a client are kept, its version. A round touches its cohort alone, and a
    checkpoint holds the clients above the floor.

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
        """Count the bytes, as they are sent, that each client needs to be up to date [K]."""
        if not len(clients):
            return np.zeros(0, dtype=np.int64)
        versions = np.maximum(self.versions[clients.numpy()], self.floor)
        if (versions == versions[0]).all():  # as where everybody is asked in every round
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
        """Return tensors for a checkpoint; clients at the floor or below go back to version 0."""
        seen = np.flatnonzero(self.versions)  # no array of the population is made
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
