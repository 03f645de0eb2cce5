"""What can go wrong with the file of the trials, ``tune.db``, in the terms of the system.

Optuna hides what SQLite says in errors of its own and of SQLAlchemy.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedraclora.errors import CheckpointError

KEPT = "with its finished runs kept; give the same command to resume"
OF_SYSTEM = {
    "SQLITE_FULL": errno.ENOSPC,
    "SQLITE_READONLY": errno.EACCES,
    "SQLITE_PERM": errno.EACCES,
    "SQLITE_CANTOPEN": errno.EACCES,
    "SQLITE_IOERR": errno.EIO,
}


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Say of a system error inside that finished runs are kept, be it SQLite's or of a file.

    Args:
        folder: Holds ``tune.db``.

    Raises:
        OSError: Where the file cannot be written, for a full disk say.
        CheckpointError: Where it is damaged, or another process holds it for too long.
    """
    try:
        with _of_sqlite(folder / "tune.db"):
            yield
    except OSError as error:
        error.add_note(KEPT)
        raise


@contextmanager
def _of_sqlite(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if (found := _cause(error)) is None:
            raise
        name = "_".join(found.sqlite_errorname.split("_")[:2])
        if (number := OF_SYSTEM.get(name)) is not None:
            raise OSError(number, os.strerror(number), str(file)) from error
        if name in {"SQLITE_BUSY", "SQLITE_LOCKED"}:
            raise CheckpointError(
                f"{file}: {found}, by another process. Give the same command when that has ended"
            ) from error
        raise CheckpointError(
            f"{file} is damaged ({found}). Restore it from a copy, or name another folder "
            "(output.dir)"
        ) from error


def _cause(error: BaseException | None) -> sqlite3.Error | None:
    """Find the error of SQLite from which another came."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__ or error.__context__
    return error if hasattr(error, "sqlite_errorname") else None
