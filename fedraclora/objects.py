"""Objects of a Python program that stand in a config by their digest: models, data.

A config is plain text, and a module or an array is not. The program lends its object to this
process, and the config names it by what it is: the same object gives the same config, hence the
same run, and a run that goes on wants the same object again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedraclora.errors import ConfigError
from fedraclora.imports import importing

NAME = "object"  # what a group is called that stands for one
_LENT: dict[str, Any] = {}


def lend(thing: Any, digest: str) -> str:
    """Keep an object of the caller's under its digest; give that back."""
    _LENT[digest] = thing
    return digest


def lent(group: str, digest: object) -> Any:
    """Return the object with a digest.

    Args:
        group: Of the config, for the message: ``model``, ``data`` or ``method``.
        digest: What the config says.

    Raises:
        ConfigError: If this process has no such object.
    """
    if digest in _LENT:
        return _LENT[str(digest)]
    raise ConfigError(
        f"this run has an object of a Python program as its {group}, of digest {digest}, which "
        f"this process does not have: call fedraclora.simulate({group}=...) with the same object, "
        "and folder=..., resume=True to go on"
    )


def named_by(config: Mapping[str, object]) -> dict[str, Any]:
    """Find the objects that a config names, by digest, as far as this process has them."""
    digests = [
        str(group.get("digest"))
        for group in config.values()
        if isinstance(group, Mapping) and group.get("name") == NAME
    ]
    return {digest: _LENT[digest] for digest in digests if digest in _LENT}


def write(folder: Path, config: Mapping[str, object]) -> None:
    """Write the objects of a config for other processes of this user and machine."""
    if found := named_by(config):
        import cloudpickle

        (folder / "objects.pkl").write_bytes(cloudpickle.dumps(found))


def read(folder: Path) -> None:
    """Take over what `write` wrote into a folder of this user's."""
    path = folder / "objects.pkl"
    if path.is_file():
        import cloudpickle

        with importing("a client process"):
            _LENT.update(cloudpickle.loads(path.read_bytes()))
