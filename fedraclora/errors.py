"""Define all errors that this project raises on purpose, under one base.

A message says what is wrong, why, and what to do. `commands.cli` prints it without a traceback and
exits with status 1, so the text must be enough for the user.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from difflib import SequenceMatcher

from fedraclora.renamed import instead_of

FULL = {errno.ENOSPC, errno.EDQUOT}
CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
LISTED = 40  # most names in a message that already has a near one


class FedRacLoraError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(FedRacLoraError):
    """The configuration asks for something impossible; the message names the key."""


class KeysError(ConfigError):
    """The configuration has keys that it should not have, or lacks some.

    Attributes:
        keys: Their paths, for example ``local.lr``.
    """

    def __init__(self, message: str, keys: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class UnreadKeysError(KeysError):
    """Keys that do not exist, or have no effect in this configuration."""


class MissingKeysError(KeysError):
    """Keys that are missing and have no default."""


class ShapeError(FedRacLoraError):
    """Tensors do not fit together; the message gives the shapes."""


class DataError(FedRacLoraError):
    """A data file is missing or has a wrong checksum; the message has the command that gets it."""


class ModelError(FedRacLoraError):
    """A model has a layer or a target that cannot be trained as requested."""


class WireError(FedRacLoraError):
    """A message does not contain what its header says."""


class StaleError(WireError):
    """Base weights cannot be updated to a version by merges: the full weights are needed."""


class CheckpointError(FedRacLoraError):
    """A run folder or a checkpoint is missing, damaged, or belongs to another configuration."""


class EngineError(FedRacLoraError):
    """The engine did not start, or failed; the message says why."""


class StoppedError(EngineError):
    """The run was stopped from outside, between two rounds or within one that is not closed."""


class ClientError(FedRacLoraError):
    """A client failed; the message names the client and the round."""


class AbsentError(ClientError):
    """Too few clients are connected, or the owners of their data refuse."""


class RoundLostError(ClientError):
    """A round cannot be run, even after a retry; the message says why."""


class DivergenceError(ClientError):
    """Clients' losses or updates are not finite: the run cannot continue."""


# Raised where clients train, these are no fault of a client: every client of the run would raise
# them.
OF_THE_RUN = (ConfigError, ModelError)


def unknown(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not in a table, with the nearest name and all names.

    If there are more than `LISTED`, only the nearest is named.

    Args:
        kind: What the name should be, for example ``"method"``.
        name: The unknown name.
        known: The names that exist.

    Returns:
        The error, to be raised by the caller.

    Example:
        >>> print(unknown("data", "mnits", ["shakespeare", "mnist"]))
        unknown data 'mnits'; did you mean 'mnist'? There are: mnist, shakespeare
    """
    if instead := instead_of(kind, name):
        return ConfigError(f"{kind} {str(name)!r} is no more: {instead}")
    names = sorted(known)
    near = nearest(str(name), names)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = "" if near and len(names) > LISTED else f" There are: {', '.join(names)}"
    return ConfigError(f"unknown {kind} {str(name)!r}{hint}{listed}")


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """Find the names that are most similar to one that does not exist; empty if none is similar.

    For dotted names the last part decides: equal, its initials, its beginning, or most of its
    letters. Among equals, names of the most similar group come first, then the order of ``known``.

    Args:
        name: The unknown name.
        known: The names that exist.
        count: Most names to return if several are similar.

    Example:
        >>> nearest("local.learning_rate", ["local.epochs", "local.lr", "pretrain.lr"])
        ['local.lr']
        >>> nearest("lr", ["local.epochs", "local.lr", "pretrain.lr"], count=2)
        ['local.lr', 'pretrain.lr']
    """
    group, _, leaf = name.rpartition(".")

    def likeness(other: str) -> float:
        there, _, last = other.rpartition(".")
        return _alike(leaf, last) + 0.1 * _alike(group, there)

    ranked = sorted(known, key=likeness, reverse=True)
    best = max(0.6, likeness(ranked[0])) if ranked else 0.6
    return [other for other in ranked[:count] if likeness(other) >= best]


def _alike(one: str, other: str) -> float:
    """Return the similarity of two words, from 0 to 1."""
    if one == other:
        return 1.0
    one, other = one.casefold(), other.casefold()
    if one == other:
        return 0.95
    if {one, other} & {_initials(one), _initials(other)}:
        return 0.9
    least = 0.85 if len(one) > 2 and other.startswith(one) else 0.0  # its first letters
    return max(least, SequenceMatcher(None, one, other).ratio())


def _initials(words: str) -> str | None:
    """Return the initials of words that underscores join; None for one word."""
    parts = words.split("_")
    return "".join(part[:1] for part in parts) if len(parts) > 1 else None


def of_system(error: OSError) -> str:
    """Describe an error of the operating system: a full disk, a folder without write permission."""
    where = f"{error.filename}: " if error.filename is not None else ""
    what = f"{where}{error.strerror or error}"
    if error.errno in FULL:
        return f"{what}; make room there before you run this again"
    if error.errno in CLOSED:
        user = f"user {os.geteuid()}"  # a service's user may not be the one at the terminal
        return f"{what}; have its owner let {user} read or write it, or choose another output.dir"
    if error.errno == errno.ENAMETOOLONG:
        return f"{what}; choose a shorter name"
    return what
