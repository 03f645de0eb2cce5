"""A worker's copy of the base weights, with its version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from typing_extensions import override

from fedraclora.checkpoint import load_tensors, save_tensors
from fedraclora.errors import CheckpointError, WireError
from fedraclora.tree import Tree


@dataclass
class Replica:
    """Base weights and the version they stand at.

    In one process the server and the workers share one replica: the server publishes, the
    workers read, and nothing is copied.
    """

    base: Tree
    version: int = 0

    def publish(self, base: Tree, version: int) -> None:
        """Replace the weights by those of a later version."""
        self.base, self.version = base, version

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
    def publish(self, base: Tree, version: int) -> None:
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
