"""Collect the JSON values that the page shows of a run, several runs, a study or a tuning."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedraclora.commands.report.page import (
    ReportedRun,
    figure,
    figures_of_runs,
    labels_of,
    read_shown,
)
from fedraclora.commands.run_files import find_runs
from fedraclora.commands.watch.studies import RUNS, holds_study, study_figures, study_status
from fedraclora.commands.watch.tuning import DATABASE, tuning_figures, tuning_status
from fedraclora.errors import CheckpointError, FedRacLoraError
from fedraclora.run.ledger import number, round_seconds
from fedraclora.run.stopped import STOPPED
from fedraclora.terminal.progress import seconds_left

if TYPE_CHECKING:
    import plotly.graph_objects as go

    Figures = Mapping[str, go.Figure]

Status = dict[str, Any]

SHOWN_RUNS = 12  # the runs that have written last
SHOWN_EVENTS = 20
CLOSING = 60.0  # seconds after the last round in which a run may still write its results
SLOW = 3.0  # a round is slow after this multiple of the usual seconds
SLOW_LEAST = 10.0  # and after this many seconds
FILES = ("ledger.jsonl", "summary.json", STOPPED, "config.yaml", "clients.parquet")


class Watched:
    """Reads a folder, and reads it again after one of its files has changed.

    Args:
        folder: The folder of a run, several runs, a study or a tuning; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._seen: object = None
        self._found: tuple[Status, Callable[[], Figures]] = ({}, dict)
        self._version = 0

    def status(self) -> Status:
        """Return everything but the figures; ``version`` changes if the figures do."""
        with self._lock:
            folders = self._folders()
            seen = [_stamp(folder) for folder in folders]
            if seen != self._seen:
                self._found, self._seen = self._read(folders), seen
                self._version += 1
            status = {**self._found[0], "folder": str(self.folder), "version": self._version}
        if status.get("state") == "running" and (written := status.get("written")):
            status["since"] = time.time() - written
            usual = status["seconds"] or 0.0
            status["slow"] = status["since"] > max(SLOW * usual, SLOW_LEAST)
        return status

    def figures(self) -> str:
        """Return the figures by title, as Plotly's JSON."""
        with self._lock:
            found = self._found[1]()
        return f"{{{', '.join(f'{json.dumps(k)}: {f.to_json()}' for k, f in found.items())}}}"

    def _folders(self) -> list[Path]:
        """Return the run folders to display: the latest `SHOWN_RUNS`, sorted by name."""
        whole = (self.folder / DATABASE).is_file() or holds_study(self.folder)
        if whole or not self.folder.is_dir():
            return [self.folder]
        try:
            found, _ = find_runs([self.folder])
        except CheckpointError:  # no run has started
            return [self.folder]
        return sorted(sorted(found, key=_written)[-SHOWN_RUNS:])

    def _read(self, folders: Sequence[Path]) -> tuple[Status, Callable[[], Figures]]:
        try:
            if (self.folder / DATABASE).is_file():
                trials = tuning_status(self.folder)
                return trials, lambda: tuning_figures(self.folder)
            if holds_study(self.folder):
                return study_status(self.folder), lambda: study_figures(self.folder)
            begun = [folder for folder in folders if _has_rows(folder)]
            if not begun:
                return {"state": "starting", "title": "No round has been written yet"}, dict
            runs = [read_shown(folder) for folder in begun]
        except FedRacLoraError as error:  # a file is damaged, or is being replaced right now
            return {
                "state": "unreadable",
                "title": "This folder cannot be read",
                "why": str(error),
            }, dict
        return (described(runs[0]) if len(folders) == 1 else _of_runs(runs)), lambda: _figures(runs)


def _written(folder: Path) -> float:
    return max((stamp[1] for stamp in _stamp(folder)[1:] if stamp), default=0.0)


def _stamp(folder: Path) -> list[Any]:
    """Return sizes and times of a folder's files, which differ after every change."""
    from fedraclora.run.folder import is_running

    found: list[Any] = [is_running(folder)]
    for name in (*FILES, DATABASE, RUNS):
        try:
            stat = (folder / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((stat.st_size, stat.st_mtime))
    return found


def _has_rows(folder: Path) -> bool:
    ledger = folder / "ledger.jsonl"
    return ledger.is_file() and ledger.stat().st_size > 0


def described(run: ReportedRun) -> Status:
    """Describe one run."""
    rounds = int(str(run.config.get("rounds")))
    seconds = [lap for row in run.rows if (lap := round_seconds(row))]
    left = seconds_left(seconds, rounds - run.last) if run.running else None
    name, value = run.headline or ("", math.nan)
    shown = f"{'final' if run.summary else 'latest'} {name}"
    written = (run.folder / "ledger.jsonl").stat().st_mtime
    closing = run.state == "stopped" and run.last >= rounds and time.time() < written + CLOSING
    return {
        "title": run.title,
        "state": "closing" if closing else run.state,
        "text": f"{run.last} rounds" if run.summary else f"round {run.last} of {rounds}",
        "why": run.stopped or "",
        "done": run.last,
        "of": max(rounds, run.last) if run.running else run.last if run.summary else rounds,
        "left": left,
        "seconds": seconds_left(seconds, 1),
        "written": written,
        "headline": {"name": name, "value": figure(value), "before": figure(run.before)},
        "cards": {
            key: text for key, text in run.cards.items() if text and key not in (shown, "rounds")
        }
        | {"clients": run.clients},
        "clients": left_out(run),
        "events": [*_events(run)][-SHOWN_EVENTS:],
    }


def _events(run: ReportedRun) -> Iterable[tuple[object, str]]:
    """List incidents and notes with their round: late nodes, repeated messages, warnings."""
    for row in run.rows:
        for key in ("incidents", "notes"):
            texts = row.get(key)
            yield from (
                (row["round"], str(text)) for text in (texts if isinstance(texts, list) else ())
            )


def left_out(run: ReportedRun) -> list[dict[str, object]]:
    """Count the failed or dropped replies of each client, the most frequent first.

    Returns:
        Client, number of rounds, last round and last reason; at most `SHOWN_EVENTS` of them.
    """
    found: dict[object, dict[str, object]] = {}
    for round_, client, reason, kind in run.failures:
        before = found.get(client, {"times": 0})
        times = int(str(before["times"])) + 1
        why = f"{kind}: {reason}"
        found[client] = {"client": client, "times": times, "last": round_, "why": why}
    ordered = sorted(found.values(), key=lambda each: -int(str(each["times"])))
    return ordered[:SHOWN_EVENTS]


def _of_runs(runs: Sequence[ReportedRun]) -> Status:
    """Describe several runs, each by a row of a table."""
    rows = []
    for label, run in zip(labels_of(runs), runs, strict=True):
        name, value = run.headline or ("", math.nan)
        rows.append(
            {
                "run": label,
                "state": run.state,
                "round": run.reached,
                name or "metric": figure(value),
            }
        )
    running = any(run.running for run in runs)
    ended = sum(bool(run.summary) for run in runs)
    rounds = [(run.last, max(run.last, int(number(run.config, "rounds")))) for run in runs]
    return {
        "title": f"{len(runs)} runs",
        "state": "running" if running else "finished" if ended == len(runs) else "stopped",
        "text": f"{ended} of {len(runs)} runs at their ends",
        "done": sum(done for done, _ in rounds),
        "of": sum(every for _, every in rounds),
        "table": rows,
    }


def _figures(runs: Sequence[ReportedRun]) -> dict[str, go.Figure]:
    curves, spread = figures_of_runs(runs)
    return curves | spread
