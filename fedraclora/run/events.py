"""Print events of a run, for a program that follows it from another machine.

Each event is one line of JSON in the server's output: Flower's log stream is the only way from a
server to the program that started a run there. Other lines of the log are ignored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from fedraclora.binding import PlainDict
from fedraclora.run.callback import Callback, RunStart
from fedraclora.run.ledger import Row, read_ledger
from fedraclora.run.log import PROJECT
from fedraclora.run.recorder import checkpoint_meta
from fedraclora.run.stopped import stop_kind

MARK = "fedraclora-event "  # prefix of an event's line
OPENING, ROW, SUMMARY = "opening", "row", "summary"
NOTICE, STOPPED = "notice", "stopped"
TEXT, TIME, ROUND, KIND = "text", "time", "round", "kind"  # keys of those two


@dataclass(frozen=True)
class Event:
    r"""Hold an event of a run.

    Attributes:
        kind: ``opening`` (the run's facts: `RunStart.facts`), ``row`` (a row of the ledger),
            ``summary`` (the final figures), ``notice`` (a warning of the run's log) or ``stopped``
            (the run ended early: how, and with a checkpoint after which round).
        value: Its content, as values of JSON.

    Example:
        >>> Event.read(Event("row", {"round": 1}).line)
        Event(kind='row', value={'round': 1})
        >>> Event.read("INFO: another line\n") is None
        True
    """

    kind: str
    value: PlainDict

    @property
    def line(self) -> str:
        """Return the line of the log."""
        return f"{MARK}{json.dumps(vars(self), default=str)}\n"

    @classmethod
    def read(cls, line: str) -> Event | None:
        """Parse a line of a log; None if it is not an event."""
        return cls(**json.loads(line.removeprefix(MARK))) if line.startswith(MARK) else None


class EventRecord(Callback):
    """Print the events of a run.

    Args:
        followed: The last round that whoever follows the run has; those after it are printed again
            when the run is resumed.
    """

    def __init__(self, followed: int = 0) -> None:
        self._followed = followed
        self._folder: Path | None = None

    @override
    def begin(self, run: RunStart) -> None:
        self._folder = run.folder
        write_event(OPENING, run.facts)
        if run.done > self._followed and run.folder is not None:
            for row in read_ledger(run.folder / "ledger.jsonl")[self._followed + 1 : run.done + 1]:
                write_event(ROW, row)

    @override
    def row(self, row: Row) -> None:
        write_event(ROW, row)

    @override
    def end(self, summary: Mapping[str, object], *, failed: bool) -> None:
        if not failed:
            write_event(SUMMARY, summary)
        elif self._folder is not None:
            kept = checkpoint_meta(self._folder).get("round")
            write_event(STOPPED, {ROUND: kept, KIND: stop_kind(self._folder)})


class NoticeHandler(logging.Handler):
    """Print warnings of a run as events, at once."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        write_event(NOTICE, {TEXT: record.getMessage(), TIME: record.created})


@contextmanager
def noticed() -> Iterator[None]:
    """Print each warning that is logged inside as an event, also in a search before round 1."""
    handler = NoticeHandler(logging.WARNING)
    PROJECT.addHandler(handler)
    try:
        yield
    finally:
        PROJECT.removeHandler(handler)


def write_event(kind: str, value: Mapping[str, object]) -> None:
    """Print an event."""
    print(Event(kind, dict(value)).line, end="", flush=True)  # noqa: T201
