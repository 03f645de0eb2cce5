"""Manage the cache folder of a node, which its node-config names.

The folder of a client is ``<cache>/fedraclora-cache/<run>/<client>``, where ``cache`` is a key of
the node's configuration: a folder that may have other content. Folders created here contain a file
`MARKER`, and folders without one are neither changed nor removed. Flower's process for each message
imports this module, so it must be light.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context

from fedraclora.errors import ClientError, ConfigError, WireError

RUNS = 4  # runs whose weights a cache keeps
NAME = 32  # characters of a run's name (`fedraclora.run.folder.run_id`)
CACHE = "fedraclora-cache"  # subfolder of the folder that the node's configuration names
MARKER = ".made-by-fedraclora"
FEW = 10  # clients that are named one by one


def some(clients: list[int]) -> str:
    """Format the clients of a node for a message; for many, the first and the last."""
    return str(clients) if len(clients) < FEW else f"[{clients[0]}, ..., {clients[-1]}]"


def cache_of(context: Context) -> Path:
    """Return the folder for a node's files.

    Raises:
        ConfigError: If the node's configuration names none, or an impossible one.
    """
    cache = context.node_config.get("cache", os.environ.get("FLWR_HOME", "~/.flwr"))
    if not isinstance(cache, str) or not cache or "\0" in cache:
        raise ConfigError(
            f"node-config cache={cache!r}: not a path. Set cache to the path of a folder"
        )
    try:
        return Path(cache).expanduser().absolute() / CACHE
    except RuntimeError as error:  # ~NAME of an unknown user
        raise ConfigError(f"node-config cache={cache!r}: {error}") from error


def folder_of(context: Context, run: str, client: int) -> Path:
    """Return the folder in which a client keeps its state of a run."""
    if not (run.isascii() and run.isalnum()):  # it becomes a path, and comes from another machine
        raise WireError(
            f"run={run!r:.100}: not a valid name of a run, since it becomes the name of a "
            "folder here. Use letters and digits only"
        )
    return cache_of(context) / run / str(client)


def make_room(folder: Path) -> None:
    """Create the folder of a run, and remove the oldest folders if there are too many.

    A run and its probe runs, whose names begin with its own, count as one; when it trains itself,
    those of its probe runs go.

    Raises:
        ClientError: If it cannot be created.
        ConfigError: If it, or its cache, belongs to another user.
    """
    claim(folder.parent)
    claim(folder)
    folder.touch()
    runs: dict[str, list[Path]] = {}
    for path in folder.parent.iterdir():
        if is_claimed(path) and not path.is_symlink():
            runs.setdefault(path.name[:NAME], []).append(path)
    newest = {name: max(path.stat().st_mtime for path in of) for name, of in runs.items()}
    old = [path for name in sorted(newest, key=newest.__getitem__)[:-RUNS] for path in runs[name]]
    if len(folder.name) == NAME:
        old += [path for path in runs.get(folder.name, ()) if path != folder]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


def claim(folder: Path) -> None:
    """Create a folder with the marker; an existing one must have the marker or be empty.

    Raises:
        ClientError: If it cannot be created.
        ConfigError: If it has other content, or other users may change it or its path.
    """
    with on_disk(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_path(folder)
        # Checked twice: another process of this node may be claiming it now.
        if not is_claimed(folder) and any(folder.iterdir()) and not is_claimed(folder):
            raise ConfigError(
                f"{folder}: the folder has no file {MARKER}, so fedraclora did not make it "
                "and will not change it. Move it away, or set cache in node-config to "
                "another folder"
            )
        (folder / MARKER).touch()


@contextmanager
def on_disk(folder: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a `ClientError` that names the folder and the remedy.

    Args:
        folder: The folder of the files.

    Raises:
        ClientError: For an error of the system.
    """
    try:
        yield
    except OSError as error:
        raise ClientError(
            f"{folder}: {error.strerror or error}; the node cannot keep its files there. "
            "Remove what is in the way, make room, or set cache in node-config to a folder "
            f"that user {os.geteuid()} may write to"
        ) from error


def check_path(folder: Path) -> None:
    """Check that only this user and root can replace a folder.

    Files read from there are trusted, and data from a socket there are unpickled.

    Raises:
        ConfigError: If other users own a part of its path, or may write to one.
        OSError: If a part cannot be read.
    """
    real = folder.resolve()
    for part in {folder, *folder.parents, real, *real.parents}:
        found = part.lstat()
        mode = stat.S_IMODE(found.st_mode)
        if found.st_uid not in {0, os.geteuid()}:
            why = f"belongs to user {found.st_uid}"
        elif stat.S_ISLNK(found.st_mode) or (mode & stat.S_ISVTX and part != folder):
            continue  # a link has no mode; in a sticky folder users cannot move files of others
        elif mode & stat.S_IWOTH or (mode & stat.S_IWGRP and not _alone_in(found.st_gid)):
            why = f"has mode {mode:o}"
        else:
            continue
        raise ConfigError(
            f"{part}, where this node keeps its files, {why}, so others could replace the "
            f"files. Let only user {os.geteuid()} or root own it and write to it (chmod "
            "go-w), or set cache in node-config to another folder"
        )


def _alone_in(group: int) -> bool:
    """Check whether a group has only this user, as many systems create one for each."""
    try:
        name, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except KeyError:
        return False
    return found.gr_name == name and {*found.gr_mem} <= {name}


def is_claimed(folder: Path) -> bool:
    """Check whether a folder was made by `claim`."""
    return (folder / MARKER).is_file()
