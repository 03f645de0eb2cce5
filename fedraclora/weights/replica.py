"""A worker's copy of the base weights, with its version."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedraclora.errors import CheckpointError, WireError
from fedraclora.protocol.link import Link, Plan, apply_link
from fedraclora.tree import Tree, fingerprint, to_numpy
from fedraclora.weights.files import load_tensors, save_tensors

Arrays = dict[str, npt.NDArray[np.generic]]


@dataclass
class Replica:
    """Base weights and the version they stand at.

    In one process the server and the workers share one replica: the server publishes, the
    workers read, and nothing is copied.
    """

    base: Tree
    version: int = 0

    def publish(self, base: Tree, version: int, link: Link | None = None) -> None:
        """Replace the weights by those of a later version.

        Args:
            base: The weights.
            version: Their version.
            link: How they follow from the version before; None if nothing changed.
        """
        del link  # for replicas that are elsewhere
        self.base, self.version = base, version

    def recall(self, base: Tree, links: Iterable[tuple[int, Link]], version: int) -> None:
        """Take over the history of a run that goes on, where links of its past are of use.

        Args:
            base: Its weights now.
            links: Of its rounds, in order, where they were kept.
            version: Where it stands.
        """
        # The strategy publishes the weights themselves when it starts.

    def at(self, version: int, round_: int) -> Tree:
        """Give the weights, which must stand at ``version``.

        Raises:
            WireError: If they stand elsewhere.
        """
        if version != self.version:
            raise WireError(
                f"round {round_}: the replica holds version {self.version} of the base weights, "
                f"the server asks for {version}"
            )
        return self.base


@dataclass(frozen=True)
class WeightNews:
    """How a replica gets to a version of the base weights.

    Attributes:
        version: Where to.
        mark: Fingerprint of the weights at that version: the replica proves itself by it.
        links: What has happened since the version it holds, or None where dense is smaller.
        dense: The weights as arrays, or None.
    """

    version: int
    mark: int
    links: tuple[Link, ...] | None
    dense: Arrays | None


class VersionLog(Replica):
    """The server's weights, with the links by which replicas elsewhere can follow.

    The newest links are kept, as many as are together smaller than the weights.
    """

    def __init__(self) -> None:
        super().__init__({}, -1)
        self._links: list[Link] = []
        self._mark: int | None = None
        self._arrays: Arrays | None = None

    @override
    def publish(self, base: Tree, version: int, link: Link | None = None) -> None:
        follows = 0 <= self.version == version - 1
        self._links = [*self._links, link or Link()] if follows else []
        dense = sum(t.numel() for t in base.values())
        while self._links and sum(map(numbers, self._links)) >= dense:
            del self._links[0]  # whoever is that far behind is better off with the weights
        self._mark = self._arrays = None
        super().publish(base, version)

    @property
    def oldest(self) -> int:
        """The oldest version from which links lead here."""
        return self.version - len(self._links)

    def since(self, version: int | None) -> WeightNews:
        """Give what a replica at ``version`` needs; None for one that holds nothing."""
        if self._mark is None:
            self._mark = fingerprint(self.base)
        if version is not None and self.oldest <= version <= self.version:
            links = tuple(self._links[version - self.oldest :])
            return WeightNews(self.version, self._mark, links, None)
        if self._arrays is None:
            self._arrays = {n: to_numpy(t) for n, t in self.base.items()}
        return WeightNews(self.version, self._mark, None, self._arrays)


class Follower(Replica):
    """A replica in another process, which follows a `VersionLog`.

    Args:
        plan: Of the run: how links are folded in.
        device: Where the weights are kept.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__({}, -1)
        self.plan, self.device = plan, device

    def follow(self, news: WeightNews) -> bool:
        """Go to the version of ``news``; False if it needs the dense weights for that.

        Raises:
            WireError: If dense weights do not match their fingerprint.
        """
        if news.version == self.version:
            return True
        if news.dense is not None:
            base = {n: torch.tensor(a).to(self.device) for n, a in news.dense.items()}
        elif news.links is not None and self.version == news.version - len(news.links):
            base = self.base
            for link in news.links:
                base = apply_link(base, link, self.plan)
        else:
            return False
        if fingerprint(base) != news.mark:
            if news.dense is None:  # another processor may round a product differently
                return False
            raise WireError(f"version {news.version} of the base weights came damaged")
        self.publish(base, news.version)
        return True


def numbers(link: Link) -> int:
    """Count the numbers of a link."""
    factors = (f for term in link.terms.values() for f in term.factors)
    drawn = sum(f.numel() for f in factors if isinstance(f, torch.Tensor))
    own = drawn + sum(t.numel() for t in link.dense.values())
    return own + sum(map(numbers, link.rest))


class FileReplica(Replica):
    """Base weights in a folder: one process publishes them, others of the machine read them.

    For runtimes in which a message may meet any process, or a fresh one: whatever a process holds,
    it finds the version that the message names. Only the newest version is kept.

    Args:
        folder: Where the weights lie; it is there.
        device: Where readers want them.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        super().__init__({}, -1)
        self.folder, self.device = folder, device

    @override
    def publish(self, base: Tree, version: int, link: Link | None = None) -> None:
        save_tensors(self._path(version), base, {"version": version}, sync=False)
        for path in self.folder.glob("*.safetensors"):
            if path != self._path(version):
                path.unlink()

    @override
    def at(self, version: int, round_: int) -> Tree:
        if version != self.version:
            self.base, self.version = self._read(version, round_), version
        return self.base

    def _path(self, version: int) -> Path:
        return self.folder / f"{version:06d}.safetensors"

    def _read(self, version: int, round_: int) -> Tree:
        path = self._path(version)
        if not path.is_file():
            raise WireError(
                f"round {round_}: {self.folder} does not hold version {version} of the base "
                "weights; the server publishes it before it asks, and removes it when it goes on"
            )
        try:
            tensors, _ = load_tensors(path, "the server writes it anew with the next round")
        except CheckpointError as error:
            raise WireError(
                f"round {round_}: version {version} of the base weights: {error}"
            ) from error
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}
