"""Keep the server's history of weights, and the updates for copies in other processes.

Each Ray worker, Flower process of this machine and remote client has a
`fedraclora.weights.replica.Replica`. A `WeightUpdate` brings it from its version to the newest: for
each weight the merges in between, or the full weight with the tensors kept beside it, whichever is
smaller, as `fedraclora.weights.chain.LinkSizes` counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from typing_extensions import override

from fedraclora.codec import join, split
from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.factor import weight_of
from fedraclora.protocol.link import Link
from fedraclora.protocol.quantized import FULL
from fedraclora.tree import Tree, fingerprint, to_numpy
from fedraclora.weights.chain import LinkSizes, term_bytes, value_bytes


@dataclass(frozen=True)
class WeightUpdate:
    """Hold an update that brings base weights to a version.

    Attributes:
        version: The new version.
        mark: Fingerprint of the new weights, which copies compare.
        start: The version that it starts from, or None: it contains every full weight.
        links: Versions in ascending order, each with the terms that lead to it.
        dense: Full weights, and the tensors kept beside them.
        kinds: Number formats of these, by name; others are not quantized.
        coding: Coding of quantized tensors, each by itself.
    """

    version: int
    mark: int
    start: int | None
    links: tuple[tuple[int, Link], ...] = ()
    dense: Tree = field(default_factory=dict, metadata={"kind": "kinds"})
    kinds: Mapping[str, str] = field(default_factory=dict)
    coding: str = NONE

    @cached_property
    def payload_bytes(self) -> int:
        """Return the bytes of its numbers, and 8 for each seed."""
        parts = [part for _, link in self.links for part in link.parts()]
        terms = [term_bytes(t, self.coding) for part in parts for t in part.terms.values()]
        values = [(t, part.kind) for part in parts for t in part.dense.values()]
        values += [(t, self.kinds.get(n, FULL)) for n, t in self.dense.items()]
        moves = sum(move.payload_bytes for part in parts for move in part.moves)
        return sum(terms) + moves + sum(value_bytes(*each, self.coding) for each in values)

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as numpy arrays, which Ray sends to other processes with one copy."""
        tensors, plain = split(self, coding=self.coding)
        return _from_arrays, ({name: to_numpy(t) for name, t in tensors.items()}, plain)


def _from_arrays(arrays: Mapping[str, Any], plain: Mapping[str, Any]) -> WeightUpdate:
    # Copied into memory allocated by torch: matrix products round by alignment.
    return join(WeightUpdate, {name: torch.tensor(a) for name, a in arrays.items()}, plain)


@dataclass
class BaseWeights:
    """Hold base weights and their version.

    In one process the server and the workers share one such object: the server publishes, the
    workers read, and nothing is copied.

    Attributes:
        coding: Coding of updates for other processes.
    """

    base: Tree
    version: int = 0
    coding: str = NONE

    def publish(  # only some overrides use the link
        self,
        base: Tree,
        version: int,
        link: Link | None = None,  # noqa: ARG002
    ) -> None:
        """Replace the weights by those of a later version.

        Args:
            base: The weights.
            version: Their version.
            link: The merge from the previous version; None if nothing changed.
        """
        self.base, self.version = base, version

    def close(self) -> None:
        """Remove the files written for workers in other processes."""

    def at(self, version: int, round_: int) -> Tree:
        """Return the weights, which must have this ``version``.

        Raises:
            WireError: If they have another version.
        """
        if version != self.version:
            raise WireError(
                f"round {round_}: the replica holds version {self.version} of the base weights, "
                f"the server asks for {version}"
            )
        return self.base


class WeightHistory(BaseWeights):
    """Hold the server's weights, with the merges that copies elsewhere need.

    For each weight the newest terms are kept, as long as they are together smaller than the weight
    and the tensors kept beside it.

    Attributes:
        oldest: The first version from which its merges are known.
    """

    def __init__(self) -> None:
        super().__init__({}, -1)
        self.oldest = -1
        self._links: list[Link] = []  # to each version above the floor, as far as they are kept
        self._sizes = LinkSizes({})
        self._mark: int | None = None
        self._updates: dict[int | None, WeightUpdate] = {}

    @override
    def publish(self, base: Tree, version: int, link: Link | None = None) -> None:
        if self.base and version == self.version + 1:
            self._sizes.add(link)
            self._links.append(link or Link())
            del self._links[: self._sizes.floor + len(self._links) - self._sizes.version]
            for i, known in enumerate(self._links):
                if known.changes:
                    self._links[i] = _terms(known, self._sizes.followed(self._sizes.floor + i))
        elif not self.base or version != self.version:
            self.oldest, self._links = version, []
            self._sizes = LinkSizes(base, self.coding)
        self._mark, self._updates = None, {}
        super().publish(base, version)

    def recall(self, base: Tree, links: Iterable[tuple[int, Link]], version: int) -> None:
        """Restore the history of a resumed run.

        Args:
            base: Its weights now.
            links: Its merges from some version on, in order; after the first, rounds without a
                change may be missing.
            version: Its version.
        """
        changes = dict(links)
        start = min(changes, default=version + 1) - 1
        self.publish(base, start)
        for number in range(start + 1, version + 1):
            self.publish(base, number, changes.get(number))

    def since(self, start: int | None) -> WeightUpdate:
        """Return the update for a copy at version ``start``; None if it has no weights."""
        if start not in self._updates:
            self._updates[start] = replace(self._since(start), coding=self.coding)
        return self._updates[start]

    def _since(self, start: int | None) -> WeightUpdate:
        if self._mark is None:
            self._mark = fingerprint(self.base)
        kinds = self._sizes.kinds
        if start is None or not self.oldest <= start <= self.version:
            return WeightUpdate(self.version, self._mark, None, dense=dict(self.base), kinds=kinds)
        first = max(start - self.oldest, self._sizes.floor)
        names = self._sizes.followed(first)
        after = enumerate(self._links[first - self._sizes.floor :], start=self.oldest + first + 1)
        links = ((version, _terms(link, names)) for version, link in after)
        dense = {name: t for name, t in self.base.items() if name not in names}
        kept = tuple((v, link) for v, link in links if link.changes)
        return WeightUpdate(self.version, self._mark, start, kept, dense, kinds)


def _terms(link: Link, names: frozenset[str]) -> Link:
    """Select the part of a merge for these weights, and the tensors that it keeps beside them.

    Parts without any of these are left out.
    """
    parts = []
    for part in link.parts():
        terms = {n: t for n, t in part.terms.items() if n in names}
        values = {n: t for n, t in part.dense.items() if (weight_of(n) or n) in names}
        moves = tuple(move for move in part.moves if names.issuperset(move.names))
        if terms or values or moves:
            parts.append(Link(terms, values, kind=part.kind, moves=moves))
    first, *rest = parts or [Link()]
    return replace(first, rest=tuple(rest))
