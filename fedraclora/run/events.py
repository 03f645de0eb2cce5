"""Print events of a run, for a program that follows it from another machine.

Each event is one line of JSON in the server's output: Flower's log stream is the only way from a
server to the program that started a run there. Other lines of the log are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override

from fedraclora.binding import PlainDict
from fedraclora.run.callback import Callback, RunStart
from fedraclora.run.ledger import Row

MARK = "fedraclora-event "  # prefix of an event's line
OPENING, ROW, SUMMARY = "opening", "row", "summary"


@dataclass(frozen=True)
class Event:
    r"""Hold an event of a run.

    Attributes:
        kind: ``opening`` (the run's facts: `RunStart.facts`), ``row`` (a row of the ledger) or
            ``summary`` (the final figures).
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
    """Print the events of a run."""

    @override
    def begin(self, run: RunStart) -> None:
        self._write(OPENING, run.facts)

    @override
    def row(self, row: Row) -> None:
        self._write(ROW, row)

    @override
    def end(self, summary: Mapping[str, object], *, failed: bool) -> None:
        if not failed:
            self._write(SUMMARY, summary)

    def _write(self, kind: str, value: Mapping[str, object]) -> None:
        print(Event(kind, dict(value)).line, end="", flush=True)  # noqa: T201
