"""The folder in which client processes of a machine find a run: settings, objects, weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from fedraclora import objects
from fedraclora.weights.replica import FileReplica

_SETTINGS = "config.json"


class JobFolder(FileReplica):
    """The server's end: makes the folder, publishes base weights there, removes it.

    Args:
        plain: The resolved config.
    """

    def __init__(self, plain: Mapping[str, object]) -> None:
        self._made = TemporaryDirectory(prefix="fedraclora-")
        super().__init__(Path(self._made.name))
        (self.folder / _SETTINGS).write_text(json.dumps(plain))
        objects.write(self.folder, plain)

    def close(self) -> None:
        """Remove the folder."""
        self._made.cleanup()


def read_settings(folder: Path) -> dict[str, object]:
    """Read the config of the run that a folder belongs to, and take over its objects."""
    objects.read(folder)
    found: dict[str, object] = json.loads((folder / _SETTINGS).read_text())
    return found
