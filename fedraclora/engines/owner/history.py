"""Keep a history of the messages of a node, in a file of the data owner."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fedraclora.engines.owner.entries import DATE, OUT, Entry
from fedraclora.engines.owner.policy import Limits
from fedraclora.engines.owner.rotation import MOST_HISTORY, line_of, rotate
from fedraclora.engines.owner.rounds import RoundCount
from fedraclora.errors import ConfigError

HISTORY = "history.jsonl"
LONGEST = 1 << 14  # bytes of an entry


class History:
    """Append entries to a file, and add up what was used.

    Several nodes may share it. Entries are on the disk before a reply leaves. Beyond `MOST_HISTORY`
    bytes, older ones are replaced by their sums (`rotation`).

    Args:
        folder: The owner's; it is made if it is missing.

    Raises:
        ConfigError: If the folder cannot be written, or the file has other lines.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / HISTORY
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.file.open("a"):
                pass
        except OSError as error:
            raise ConfigError(f"--state={folder}: {error}: give a folder of this user") from error

    def add(self, entry: Entry) -> None:
        """Append an entry, in place of a last one that a kill has cut.

        A file that has become large is rotated before.
        """
        if self.file.stat().st_size > MOST_HISTORY:
            with self._locked(), suppress(OSError):  # a full disk may yet have room for an entry
                if self.file.stat().st_size > MOST_HISTORY:  # another node may have been first
                    rotate(self.file, self.entries())
        with self._locked() as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - LONGEST))
            tail = file.read()
            file.seek(end - len(tail) + tail.rfind(b"\n") + 1)
            file.write(line_of(entry))
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """Open the file, and lock it: the one that has its name by then."""
        while True:
            with self.file.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(file.fileno()), self.file.stat()):
                    yield file
                    return

    def entries(self) -> list[Entry]:
        """Read all entries.

        Raises:
            ConfigError: If a line is no entry, except for the last, which may be cut.
        """
        return read_entries(self.file)[0]


def read_entries(file: Path, start: int = 0) -> tuple[list[Entry], int]:
    """Read the whole lines of a history from a byte on; return them, and where they end.

    Raises:
        ConfigError: If one is no entry.
    """
    with file.open("rb") as opened:
        opened.seek(start)
        found, size = entries_in(opened.read(), file)
    return found, start + size


def entries_in(new: bytes, file: Path) -> tuple[list[Entry], int]:
    """Read the whole lines of bytes of a history; return them, and their length.

    Raises:
        ConfigError: If one is no entry.
    """
    whole, found = new[: new.rfind(b"\n") + 1], list[Entry]()
    for line in whole.splitlines():
        try:
            found.append(Entry(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{file}: {line[:80]!r} is no entry of a history ({error}). "
                "Move the file away to begin anew"
            ) from error
    return found, len(whole)


@dataclass
class Usage:
    """Add up what a part of the history took.

    Attributes:
        rounds: In how many rounds this node trained (`RoundCount`).
        sent: Bytes that it sent.
        seconds: From messages to their replies.
    """

    rounds: int = 0
    sent: int = 0
    seconds: float = 0.0
    _count: RoundCount = field(default_factory=RoundCount)

    def add(self, entry: Entry) -> None:
        """Add an entry."""
        before = self._count.total
        self._count.add(entry)
        self.rounds += self._count.total - before + (entry.rounds or 0)
        if entry.way == OUT:
            self.sent += entry.bytes
            self.seconds += entry.seconds or 0.0

    def has(self, run: int, round_: str) -> bool:
        """Check whether a round is the one of its run that this node began last."""
        return self._count.has(run, round_)

    @property
    def limits(self) -> Limits:
        """Return it in the units of limits."""
        return Limits(self.rounds, self.sent / 1e6, self.seconds / 3600)


class Tally:
    """Adds up a history by run and day, and reads only what is new in its file.

    A year has more entries than could be read for each message.

    Args:
        file: The file of a `History`.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._inode = file, 0
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._read, self._runs, self._days = 0, dict[str, Usage](), dict[str, Usage]()

    def update(self) -> None:
        """Read the entries that were added; all of them if the file is another.

        Raises:
            ConfigError: If a line is no entry.
        """
        with self.file.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or about.st_size < self._read:
                self._begin_anew()
            self._inode = about.st_ino
            file.seek(self._read)
            added, size = entries_in(file.read(), self.file)
        self._read += size
        for entry in added:
            for table, key in ((self._runs, entry.digest), (self._days, entry.time[:DATE])):
                table.setdefault(key, Usage()).add(entry)
        for day in sorted(self._days)[:-2]:
            del self._days[day]

    def of_run(self, digest: str) -> Usage:
        """Return what the runs with a digest took."""
        return self._runs.get(digest, Usage())

    def of_day(self, day: str) -> Usage:
        """Return what a day took, ``2026-12-31``: today or the day before."""
        return self._days.get(day, Usage())
