"""The folder in which client processes of a machine find a run: settings, objects, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from typing_extensions import override

from fedraclora import objects
from fedraclora.codec import split
from fedraclora.protocol.link import Link
from fedraclora.temporary import PrivateFolder
from fedraclora.tree import Tree
from fedraclora.weights.files import save_tensors
from fedraclora.weights.update import WeightHistory

_SETTINGS = "config.json"


class JobFolder(WeightHistory):
    """The server's end: makes the folder, writes updates of the base weights there, removes it.

    It holds a version whole, and one update for each version after it, until these are together
    not smaller: then it is begun anew. So any process, and a fresh one, finds its way.

    Args:
        plain: The resolved config.
    """

    def __init__(self, plain: Mapping[str, object]) -> None:
        super().__init__()
        self._made = PrivateFolder()
        self._size = 0  # bytes of the updates after the one that is whole
        self.folder = self._made.path
        (self.folder / _SETTINGS).write_text(json.dumps(plain))
        objects.write(self.folder, plain)

    @override
    def publish(self, base: Tree, version: int, link: Link | None = None) -> None:
        start = self.version if version == self.version + 1 else None
        super().publish(base, version, link)
        update = self.since(start)
        self._size += update.payload_bytes
        if update.start is None or self._size >= sum(t.nbytes for t in base.values()):
            self.write_whole()
        else:
            save_tensors(self._path, *split(update), sync=False)

    def write_whole(self) -> None:
        """Begin the folder anew with the newest weights."""
        save_tensors(self._path, *split(self.since(None)), sync=False)
        self._size = 0
        for path in self.folder.glob("*.safetensors"):
            if path != self._path:
                path.unlink()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.version:06d}.safetensors"

    @override
    def close(self) -> None:
        self._made.cleanup()


def read_settings(folder: Path) -> dict[str, object]:
    """Read the config of the run that a folder belongs to, and take over its objects."""
    objects.read(folder)
    found: dict[str, object] = json.loads((folder / _SETTINGS).read_text())
    return found
