"""The folder in which a node keeps files, and what its configuration says of them.

The folder of a client is ``<cache>/fedraclora-cache/<run>/<client>``, where ``cache`` is a key of
the node's configuration: a folder that may hold anything else. What is made here has a file
`MARKER` in it, and nothing without one is written into or removed. Flower's process for each
message imports this, so that it must cost nothing.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flwr.app import Context

from fedraclora.errors import ConfigError, WireError

RUNS = 4  # of whose weights a cache keeps
CACHE = "fedraclora-cache"  # inside the folder that the node's configuration names
MARKER = ".made-by-fedraclora"


def served(context: Context) -> list[int]:
    """Read the ids of the clients of this node.

    Raises:
        ConfigError: If the node's configuration does not name them.
    """
    config = context.node_config
    text = str(config.get("partition-ids", config.get("partition-id", "")))
    ids = [int(word) for word in text.replace(",", " ").split() if word.isdecimal()]
    if not ids:
        raise ConfigError(
            f"node-config has partition-id={text!r}: the number of this node's client is wanted, "
            "or partition-ids with several, parted by commas"
        )
    return ids


def cache_of(context: Context) -> Path:
    """Return the folder in which a node keeps files."""
    cache = context.node_config.get("cache", os.environ.get("FLWR_HOME", "~/.flwr"))
    return Path(str(cache)).expanduser() / CACHE


def folder_of(context: Context, run: str, client: int) -> Path:
    """Return the folder in which a client keeps its state of a run."""
    if not (run.isascii() and run.isalnum()):  # it becomes a path, and comes from outside
        raise WireError(
            f"the name of a run is {run!r:.100}; it names a folder here, so that only letters and "
            "digits may be in it"
        )
    return cache_of(context) / run / str(client)


def make_room(folder: Path) -> None:
    """Make the folder of a run, and remove those of the oldest where there are too many.

    Raises:
        ConfigError: If it, or the cache that it lies in, is a folder of somebody else.
    """
    claim(folder.parent)
    claim(folder)
    folder.touch()
    made = [p for p in folder.parent.iterdir() if is_own(p) and not p.is_symlink()]
    for old in sorted(made, key=lambda path: path.stat().st_mtime)[:-RUNS]:
        shutil.rmtree(old, ignore_errors=True)


def claim(folder: Path) -> None:
    """Make a folder with the marker; one that is there must have it, or be empty.

    Raises:
        ConfigError: If it has something else in it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Looked at twice: another process of this node may be claiming it now.
    if not is_own(folder) and any(folder.iterdir()) and not is_own(folder):
        raise ConfigError(
            f"{folder} was not made by fedraclora (it has no file {MARKER}), and is left as it is; "
            "move it away, or name another folder as cache in node-config"
        )
    (folder / MARKER).touch()


def is_own(folder: Path) -> bool:
    """Check whether a folder was made by `claim`."""
    return (folder / MARKER).is_file()
