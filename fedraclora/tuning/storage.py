"""Convert errors of the trials' file, ``tune.db``, to errors of the operating system.

Optuna wraps errors of SQLite in its own and SQLAlchemy's.
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
    """Add to a system error inside, of SQLite or of a file, that finished runs are kept.

    Args:
        folder: Holds ``tune.db``.

    Raises:
        OSError: If the file cannot be written, for example on a full disk.
        CheckpointError: If it is damaged, or another process locks it for too long.
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
    """Find the error of SQLite that caused another."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__ or error.__context__
    return error if hasattr(error, "sqlite_errorname") else None
