"""Keep a history of the messages of a node, in a file of the data owner."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedraclora.engines.owner.policy import Limits
from fedraclora.errors import ConfigError

HISTORY = "history.jsonl"
TRAIN = "train"  # how Flower's kinds of messages begin in which clients train
LONGEST = 1 << 14  # bytes of an entry
DATE = len("2026-12-31")
IN, OUT, REFUSED = "in", "out", "refused"
DOWNLOAD = "bundle"  # the way of an app's bundle, which is downloaded
# The way of all that the node has sent and received by HTTP since the last such entry.
WIRE = "wire"


@dataclass(frozen=True)
class Entry:
    """One message.

    Attributes:
        time: When it came or went, ISO 8601 in UTC.
        way: `IN`, `OUT`, or `REFUSED`: it came, and no code of the run has seen it; or `DOWNLOAD`,
            or `WIRE`, in which messages and bundle are contained.
        digest: The digest of the run.
        run: Flower's number of the run.
        node: Flower's number of this node.
        round: The round; empty for a message outside of rounds.
        kind: Flower's type of the message, as ``train.cohort``.
        bytes: Bytes of its content; of `WIRE` both ways, with headers, without TLS.
        records: Bytes of each kind of record in it.
        seconds: Of a reply: since its message came.
        samples: Of a reply of training: on how many samples, as the run's code says.
        why: Of a refused message.
    """

    time: str
    way: str
    digest: str
    run: int
    node: int
    round: str
    kind: str
    bytes: int = 0
    records: dict[str, int] | None = None
    seconds: float | None = None
    samples: int | None = None
    why: str | None = None

    @property
    def is_training(self) -> bool:
        """Return whether it is a message for which this node trained."""
        return self.way == IN and self.kind.startswith(TRAIN)


def now() -> str:
    """Return the time of an entry."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class History:
    """Append entries to a file, and add up what was used.

    Several nodes may share it. Entries are on the disk before a reply leaves.

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
        """Append an entry, in place of a last one that a kill has cut."""
        found = {key: value for key, value in asdict(entry).items() if value is not None}
        with self.file.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - LONGEST))
            tail = file.read()
            file.seek(end - len(tail) + tail.rfind(b"\n") + 1)
            file.write(json.dumps(found).encode() + b"\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

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
        new = opened.read()
    whole, found = new[: new.rfind(b"\n") + 1], list[Entry]()
    for line in whole.splitlines():
        try:
            found.append(Entry(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{file}: {line[:80]!r} is no entry of a history ({error}). "
                "Move the file away to begin anew"
            ) from error
    return found, start + len(whole)


@dataclass
class Usage:
    """Add up what a part of the history took.

    Attributes:
        rounds: The rounds in which this node trained, with Flower's number of the run.
        sent: Bytes that it sent.
        seconds: From messages to their replies.
    """

    rounds: set[tuple[int, str]] = field(default_factory=set)
    sent: int = 0
    seconds: float = 0.0

    def add(self, entry: Entry) -> None:
        """Add an entry."""
        if entry.way == OUT:
            self.sent += entry.bytes
            self.seconds += entry.seconds or 0.0
        if entry.is_training:
            self.rounds.add((entry.run, entry.round))

    @property
    def limits(self) -> Limits:
        """Return it in the units of limits."""
        return Limits(len(self.rounds), self.sent / 1e6, self.seconds / 3600)


class Tally:
    """Adds up a history by run and day, and reads only what is new in its file.

    A year has more entries than could be read for each message.

    Args:
        file: The file of a `History`.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._read, self._runs, self._days = 0, dict[str, Usage](), dict[str, Usage]()

    def update(self) -> None:
        """Read the entries that were added; all of them if the file is another.

        Raises:
            ConfigError: If a line is no entry.
        """
        if self.file.stat().st_size < self._read:
            self._begin_anew()
        added, self._read = read_entries(self.file, self._read)
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
