"""Create temporary folders that only their user can enter, and remove them with their process.

Keys, tokens and weights are in them. A process that is killed cannot remove its own: the next that
makes one does. It knows them by their name, owner and marker, and that nobody holds the lock of the
marker any more, which ends with a process however that ends (and is seen from other containers,
where its number is not).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from typing_extensions import override

PREFIX = "fedraclora-"
MARKER = ".made-by-fedraclora"
SHORT = "/tmp"  # noqa: S108  where the path of the usual place is too long for sockets
DRAWN = 8  # random characters in the name of a folder


class PrivateFolder(tempfile.TemporaryDirectory[str]):
    """A folder for temporary files; it also removes those left by killed processes.

    Args:
        home: Where to make it; None: where the machine has its temporary files.
        longest: Characters that its path may have: those of sockets below it are limited.

    Attributes:
        path: Of the folder; gone after `cleanup`.
    """

    def __init__(self, home: str | None = None, longest: int | None = None) -> None:
        home = home or tempfile.gettempdir()
        room = len(home) + len(PREFIX) + DRAWN + 1
        if longest is not None and room > longest and Path(SHORT).is_dir():
            home = SHORT
        remove_left(Path(home))
        super().__init__(prefix=PREFIX, dir=home, ignore_cleanup_errors=True)
        self.path = Path(self.name)
        mark = self.path / f"{MARKER}.new"
        self.lock = os.open(mark, os.O_WRONLY | os.O_CREAT, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        mark.rename(self.path / MARKER)  # another process sees it once it is locked

    @override
    def cleanup(self) -> None:
        super().cleanup()
        with suppress(OSError):
            os.close(self.lock)


def remove_left(home: Path) -> None:
    """Remove this user's folders, in another one, whose processes have ended."""
    for folder in home.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is being removed, or belongs to another user
            if is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)


def is_left(folder: Path) -> bool:
    """Check whether a folder was made by a process of this user that has ended.

    Raises:
        OSError: If it cannot be looked at, or has no marker.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return False
    lock = os.open(folder / MARKER, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
