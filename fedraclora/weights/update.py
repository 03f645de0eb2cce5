"""Base weights at clients on other machines: what each must be sent, and where it keeps them.

The server's `WeightHistory` knows what every weight went through; a client's `StoredReplica` is a
file on its disk. A `WeightUpdate` brings it from the version that it holds to the newest: for each
weight the low-rank terms in between or the whole weight, whichever is smaller, as
`fedraclora.weights.chain.CatchUp` counts it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from typing_extensions import override

from fedraclora.errors import CheckpointError, WireError
from fedraclora.protocol.link import Link, Plan, apply_link
from fedraclora.tree import Tree, fingerprint
from fedraclora.weights.chain import term_bytes
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.weights.replica import Replica

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightUpdate:
    """What brings base weights to a version.

    Attributes:
        version: Where to.
        mark: Fingerprint of the weights there: whoever follows proves itself by it.
        held: The version that it starts from, or None: it holds every weight whole.
        links: Versions in ascending order, each with the terms that lead to it.
        dense: Weights that are sent whole.
    """

    version: int
    mark: int
    held: int | None
    links: tuple[tuple[int, Link], ...] = ()
    dense: Tree = field(default_factory=dict)

    @property
    def payload_bytes(self) -> int:
        """Bytes of its numbers, and 8 for each seed."""
        terms = [(t, n) for _, link in self.links for n, t in link.terms.items()]
        drawn = sum(term_bytes(t, _itemsize(t)) for t, _ in terms)
        return drawn + sum(t.numel() * t.element_size() for t in self.dense.values())


def _itemsize(term: object) -> int:
    """Bytes of a number of a term's matrices; 0 where all of them are drawn."""
    factors = getattr(term, "factors", ())
    sizes = [f.element_size() for f in factors if isinstance(f, torch.Tensor)]
    return max(sizes, default=0)


class WeightHistory(Replica):
    """The server's weights, with the terms by which clients can follow.

    Of each weight the newest terms are kept, as many as are together smaller than it.
    """

    def __init__(self) -> None:
        super().__init__({}, -1)
        self.oldest = 0
        self._links: list[tuple[int, Link]] = []
        self._floor: dict[str, int] = {}  # from which version on terms lead to the newest weight
        self._mark: int | None = None

    @override
    def publish(self, base: Tree, version: int, link: Link | None = None) -> None:
        if not self.base or version not in {self.version, self.version + 1}:
            self.oldest, self._links, self._floor = version, [], {}
        elif link is not None and version == self.version + 1:
            self._links.append((version, Link(link.terms)))
            self._floor |= dict.fromkeys(link.dense, version)
            for name in link.terms:
                self._raise_floor(name, base[name].numel() * base[name].element_size())
            self._links = [(v, self._needed(v, part)) for v, part in self._links]
            self._links = [(v, part) for v, part in self._links if part.terms]
        self._mark = None
        super().publish(base, version)

    @override
    def recall(self, base: Tree, links: Iterable[tuple[int, Link]], version: int) -> None:
        """Take over the history of a run that goes on.

        Args:
            base: Its weights now.
            links: Of its rounds, in order; rounds may be missing that changed nothing.
            version: Where it stands.
        """
        self.publish(base, 0)
        for number, link in links:
            while self.version < number - 1:
                self.publish(base, self.version + 1)
            self.publish(base, number, link)
        while self.version < version:
            self.publish(base, self.version + 1)

    def since(self, held: int | None) -> WeightUpdate:
        """Give what a client at version ``held`` needs; None for one that holds nothing."""
        if self._mark is None:
            self._mark = fingerprint(self.base)
        if held is None or not self.oldest <= held <= self.version:
            return WeightUpdate(self.version, self._mark, None, dense=dict(self.base))
        dense = {n: t for n, t in self.base.items() if self._floor.get(n, 0) > held}
        links = [
            (v, Link({n: t for n, t in link.terms.items() if n not in dense}))
            for v, link in self._links
            if v > held
        ]
        links = [(v, link) for v, link in links if link.terms]
        return WeightUpdate(self.version, self._mark, held, tuple(links), dense)

    def _raise_floor(self, name: str, dense: int) -> None:
        """Forget the oldest terms of a weight until the others are smaller than it."""
        kept = [
            (v, term_bytes(t, _itemsize(t)))
            for v, link in self._links
            if (t := link.terms.get(name)) is not None and v > self._floor.get(name, 0)
        ]
        while kept and sum(size for _, size in kept) >= dense:
            self._floor[name] = kept.pop(0)[0]

    def _needed(self, version: int, link: Link) -> Link:
        return Link({n: t for n, t in link.terms.items() if version > self._floor.get(n, 0)})


class StoredReplica(Replica):
    """Base weights on the disk of a client: the newest version, written in one move.

    Args:
        folder: Where they lie; made with the first.
        plan: Of the run: how terms are folded in.
        device: Where they are wanted.
    """

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        super().__init__({}, -1)
        self.file, self.plan, self.device = replica_file(folder), plan, device
        self.mark: int | None = None
        if (found := read_stored_replica(folder)) is not None:
            base, version, self.mark = found
            super().publish({n: t.to(device) for n, t in base.items()}, version)

    def begin(self, base: Mapping[str, torch.Tensor]) -> None:
        """Take the initial weights of the model for version 0, where nothing is held."""
        if self.version < 0:
            super().publish({n: t.detach().clone() for n, t in base.items()}, 0)

    def follow(self, parcel: WeightUpdate) -> bool:
        """Go to the version of a parcel; False if every weight is needed whole for that.

        Raises:
            WireError: If a parcel of whole weights does not match its fingerprint.
        """
        if (parcel.version, parcel.mark) == (self.version, self.mark):
            return True
        whole = parcel.held is None
        if parcel.held is not None and not parcel.held <= self.version <= parcel.version:
            return False
        base = {} if whole else self.base
        for version, link in parcel.links:
            if version > self.version:
                base = apply_link(base, link, self.plan)
        base = base | {n: t.to(self.device) for n, t in parcel.dense.items()}
        if fingerprint(base) != parcel.mark:
            if not whole:  # another processor may round a product differently
                return False
            raise WireError(f"version {parcel.version} of the base weights came damaged")
        meta = {"version": parcel.version, "mark": str(parcel.mark)}
        save_tensors(self.file, base, meta, sync=True)
        self.mark = parcel.mark
        self.publish(base, parcel.version)
        return True


def replica_file(folder: Path) -> Path:
    """Where a folder holds base weights."""
    return folder / "weights.safetensors"


def read_stored_replica(folder: Path) -> tuple[Tree, int, int] | None:
    """Read weights, version and fingerprint from a folder, verified; None if there are none.

    What is damaged is as good as nothing: the client says so, and is sent every weight.
    """
    path = replica_file(folder)
    if not path.is_file():
        return None
    try:
        base, meta = load_tensors(path, "it is sent anew")
        return base, int(str(meta["version"])), int(str(meta["mark"]))
    except (CheckpointError, KeyError, ValueError) as error:
        log.warning("%s", error)
        path.unlink(missing_ok=True)
        return None
