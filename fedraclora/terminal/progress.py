"""Show the progress of a run: a bar on a terminal, and one plain line per round elsewhere."""

from __future__ import annotations

import logging
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

from rich.console import Console  # noqa: TID251  here it is made plain
from rich.progress import BarColumn, Progress, TextColumn
from typing_extensions import override

from fedraclora.run.callback import Callback, RunStart
from fedraclora.run.ledger import headline, number, round_seconds, withheld
from fedraclora.run.log import LOG
from fedraclora.terminal.opening import details_of, notes_of, opening_lines, rate_lines
from fedraclora.wire.fields import printable

log = logging.getLogger(__name__)
PROJECT = logging.getLogger("fedraclora")
RECENT = 1000  # records of its log

AVERAGED = 20  # rounds, for the time that is left
FIRST = 8  # lines that a run begins with, notes included
LEAST_BAR = 4  # characters
TOLD = 5  # incidents of a round; the ledger has all
QUIET = 30.0  # seconds without news, after which a line says so; then after twice as many each time


class RunProgress(Callback):
    """Show round, primary metric, bytes so far and remaining time, on standard error.

    Args:
        rounds: Number of all rounds.
        shown: False shows nothing.
        label: Name of the run.
        verbose: True shows all details of the start, which otherwise go only to the log.
        brief: True, for one of many runs, shows neither the start nor the rounds: only the bar, and
            where none can be drawn, now and then how far the run is.
    """

    def __init__(
        self,
        rounds: int,
        *,
        shown: bool,
        label: str,
        verbose: bool = False,
        brief: bool = False,
    ) -> None:
        self.rounds, self.shown, self.label = rounds, shown, label
        self.verbose, self.brief = verbose, brief
        self.console = plain_console(stderr=True)
        self.drawn = shown and self.console.is_interactive
        self._recent: deque[float] = deque(maxlen=AVERAGED)
        self._metric, self._withheld, self._opened = "", False, False
        self._left_out: list[str] = []
        self._noticed: set[str] = set()
        self.bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.console,
            disable=not self.drawn,
            transient=brief,
            expand=True,
        )
        self.task = self.bar.add_task("", total=rounds, text=label)
        self._news, self._doing, self._rest = time.monotonic(), "starting", ""
        self._ended, self._heard = threading.Event(), BufferingHandler(RECENT)

    def __enter__(self) -> RunProgress:
        """Start drawing."""
        self.bar.start()
        if PROJECT.hasHandlers():  # else Python prints what has no other handler
            PROJECT.addHandler(self._heard)
        if self.shown:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop drawing, whatever happened."""
        self._ended.set()
        PROJECT.removeHandler(self._heard)
        self.bar.stop()

    @override
    def begin(self, run: RunStart) -> None:
        """Show the first lines of a run, and differences from its config."""
        self.open(run.facts, run.config, run.folder)

    def open(self, facts: Mapping[str, Any], plain: Mapping[str, Any], folder: Path | None) -> None:
        """Show the same for a run that starts elsewhere.

        Everything goes to the log in the run's folder, too. Without progress, notes are logged as
        warnings, so that they are not missed.

        Args:
            facts: Of the run at its start.
            plain: Its config.
            folder: Its folder; None for a run in memory.
        """
        lines, details = opening_lines(facts, plain, folder), details_of(facts)
        notes = [f"note: {note}" for note in notes_of(facts)]
        if self._opened:  # the run begins anew, at another learning rate
            lines, details, notes = rate_lines(facts), [], []
        self._opened = True
        for line in [*lines, *details]:
            log.info("%s", line)
        for note in notes:
            log.log(logging.INFO if self.shown else logging.WARNING, "%s", note)
        if self.brief:
            return
        room = len(notes) if self.verbose or folder is None else max(1, FIRST - len(lines))
        if len(notes) > room:
            rest = f"note: {len(notes) - room + 1} more notes are in {LOG}"
            notes = [*notes[: room - 1], rest]
        for line in [*lines, *(details if self.verbose else []), *notes]:
            self.say(line)

    def say(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        self._news = time.monotonic()
        self._write(text)

    def notice(self, text: str) -> None:
        """Show at once what the row of the round may repeat; the row does not show it again."""
        self._noticed.add(text)
        self.say(text)

    def stopping(self, what: str) -> None:
        """Show that something is being stopped, instead of the current round."""
        self._doing = f"stopping {what}"
        self.say(self._doing)

    def _write(self, text: str) -> None:
        if self.shown:
            self.console.print(text, soft_wrap=True)

    def _break_silence(self) -> None:
        """Show the current activity and its duration, as long as there is no other news."""
        due = QUIET
        while not self._ended.wait(QUIET / 10):
            quiet = time.monotonic() - self._news
            if quiet < QUIET:
                due = QUIET
            elif quiet >= due:
                told = self._rest or f"{duration(quiet)} without news"
                self._write(f"still {self._doing}, {told}")
                due *= 2

    @override
    def row(self, row: Mapping[str, object]) -> None:
        if seconds := round_seconds(row):
            self._recent.append(seconds)
        round_, left = number(row, "round"), self._left(row)
        incidents = row.get("incidents")
        told = incidents if isinstance(incidents, list) else []
        # the log has said it
        heard = self._noticed | {record.getMessage() for record in self._heard.buffer}
        for text in [text for text in told if text not in heard][:TOLD]:
            self.say(f"round {round_:.0f}: {text}")
        self._noticed -= {*told}  # in a later round it is news
        out = left_out(row)
        for text in [text for text in out if text not in self._left_out][:TOLD]:
            self.say(f"round {round_:.0f}: {text}")
        self._left_out = out  # the same clients are named once, until they are back
        if (why := withheld(row)) and not self._withheld:
            self._withheld = True
            self.say(f"round {round_:.0f}: {why}")
        last = round_ == self.rounds
        if self.brief:
            self._rest = "" if last else left
        else:
            self._news = time.monotonic()
        self._doing = "closing" if last else f"in round {round_ + 1:.0f} of {self.rounds}"
        measured = metric_of(row)
        self._metric = measured or self._metric
        up, down = (size(number(row, f"{way}link_total")) for way in ("up", "down"))
        moved = f"up {up}, down {down}"
        if not self.drawn:
            loss = number(row, "train_loss")
            lost = f"training loss {loss:.4f}" if math.isfinite(loss) else ""
            parts = [part for part in (lost, measured, moved, left) if part]
            if not self.brief:
                self.say(f"round {round_:.0f} of {self.rounds}: {', '.join(parts)}")
            return
        parts = [f"{round_:.0f}/{self.rounds}", left, self.label, self._metric, moved]
        text = fitted(parts, self.console.width - LEAST_BAR - 1)
        self.bar.update(self.task, completed=round_, text=text)

    @override
    def end(self, summary: Mapping[str, object], *, failed: bool) -> None:
        if summary.get("stopped"):
            best = summary.get("best")
            told = f"; the best was round {best['round']}" if isinstance(best, dict) else ""
            self.say(f"stopped early after round {summary['rounds']} of {self.rounds}{told}")
        if note := summary.get("unmoved"):
            log.log(logging.INFO if self.shown else logging.WARNING, "%s", note)
            self.say(f"{self.label if self.brief else 'note'}: {note}")

    def _left(self, row: Mapping[str, object]) -> str:
        """Estimate the time for the remaining rounds."""
        left = seconds_left(self._recent, self.rounds - number(row, "round"))
        return "" if left is None else f"{duration(left)} left"


def seconds_left(seconds: Sequence[float], rounds: float) -> float | None:
    """Estimate the time for some rounds at the pace of the last ones; None without any.

    Args:
        seconds: Of each round so far.
        rounds: Number of remaining rounds.
    """
    recent = [*seconds][-AVERAGED:]
    return rounds * statistics.fmean(recent) if recent and rounds > 0 else None


def left_out(row: Mapping[str, object]) -> list[str]:
    """Say which clients a round went on without, by the reason.

    Example:
        >>> left_out({"failures": [{"client": 3, "reason": "no reply in time"}]})
        ['without client 3: no reply in time']
    """
    failures: Any = row.get("failures") or []
    clients = dict[str, list[str]]()
    for failure in failures:
        clients.setdefault(str(failure["reason"]), []).append(str(failure["client"]))
    return [
        f"without client{'s' * (len(each) > 1)} {', '.join(each[:TOLD])}"
        f"{f' and {len(each) - TOLD} more' if len(each) > TOLD else ''}: {printable(reason)}"
        for reason, each in clients.items()
    ]


def metric_of(row: Mapping[str, object]) -> str:
    """Format the primary metric of a row as text; empty if the row has none."""
    name = headline([row])
    if name is None:
        return ""
    value = number(row, "metrics", name)
    text = f"{name} {value:.4f}" if math.isfinite(value) else f"{name} not finite"
    mean, worst = (number(row, "clients", name, key) for key in ("mean", "worst10"))
    return (
        f"{text}, by clients {mean:.4f}, worst tenth {worst:.4f}" if math.isfinite(worst) else text
    )


def fitted(parts: Sequence[str], width: int) -> str:
    """Join as many parts as fit into a width; the first ones matter most.

    Example:
        >>> fitted(["seed 1", "", "3/9", "accuracy 0.8"], 20)
        'seed 1  3/9'
    """
    text = ""
    for part in filter(None, parts):
        longer = f"{text}  {part}" if text else part
        if len(longer) > width:
            break
        text = longer
    return text


def size(count: float) -> str:
    """Format a number of bytes as text.

    Example:
        >>> size(512), size(1_234_567), size(9.87e10)
        ('0.5 kB', '1.23 MB', '98.70 GB')
    """
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """Create a console that prints text unchanged, also names with brackets or colons."""
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def console_for_tables(piped: int = 240) -> Console:
    """Create a console; in a pipe, which has no width, it is ``piped`` wide."""
    console = plain_console()
    return console if console.is_terminal or "COLUMNS" in os.environ else plain_console(width=piped)


def duration(seconds: float) -> str:
    """Format seconds as text, in a unit that leaves one to three digits.

    Example:
        >>> duration(7.4), duration(600.0), duration(12_000.0)
        ('7 s', '10 min', '3.3 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
