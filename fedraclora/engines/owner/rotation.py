"""Keep a history bounded: replace its older entries by their sums.

The sums are what limits and ``--history`` need: messages, bytes, seconds, rounds and samples of
each run and way, for the last two days by day. The entries themselves move to a file beside the
history, in place of those that moved there before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fedraclora.engines.owner.entries import DATE, OUT, Entry
from fedraclora.engines.owner.rounds import RoundCount

MOST_HISTORY = 1 << 24  # bytes of a history; a round takes about 1 kB of it
DAYS = 2  # whose sums are kept by day
OLD = ".old"  # at the end of the name of the file that older entries move to


def rotate(file: Path, entries: Sequence[Entry]) -> None:
    """Replace the older half of a history by its sums; a kill meanwhile loses no entry.

    Args:
        file: Of the history, which the caller has locked.
        entries: All that it has.
    """
    at = cut(entries)
    _write(file.with_name(f"{file.name}{OLD}"), [e for e in entries[:at] if e.of is None])
    _write(file, [*summed(entries[:at]), *entries[at:]])


def line_of(entry: Entry) -> bytes:
    """Write an entry as a line."""
    found = {key: value for key, value in asdict(entry).items() if value is not None}
    return json.dumps(found).encode() + b"\n"


def cut(entries: Sequence[Entry]) -> int:
    """Return where the newer half begins, without parting the messages of a round."""
    half = len(entries) // 2
    last = {(e.run, e.round): k for k, e in enumerate(entries) if e.is_training}
    reach = -1
    for k, entry in enumerate(entries):
        if k >= half and reach < k:
            return k
        reach = max(reach, last.get((entry.run, entry.round), -1))
    return half


def summed(entries: Sequence[Entry]) -> list[Entry]:
    """Sum up entries, of which some may be sums themselves."""
    days = sorted({entry.time[:DATE] for entry in entries})[-DAYS:]
    groups = dict[tuple[str, ...], list[Entry]]()
    for entry in sorted(entries, key=lambda e: e.time):
        day = entry.time[:DATE]
        key = (entry.digest, entry.way, day if day in days else "")
        groups.setdefault(key, []).append(entry)
    return [_sum(own) for own in groups.values()]


def _sum(entries: Sequence[Entry]) -> Entry:
    """Sum up entries of one run and way; the time is that of the first."""
    trained = RoundCount()
    samples = dict[tuple[int, str], int]()  # of each round, and of each sum the largest
    for k, entry in enumerate(entries):
        trained.add(entry)
        if entry.samples is not None:
            key = (entry.run, entry.round if entry.of is None else f"sum {k}")
            samples[key] = samples.get(key, 0) + entry.samples
    return replace(
        entries[0],
        run=entries[-1].run,
        round="",
        kind="",
        bytes=sum(entry.bytes for entry in entries),
        records=None,
        seconds=sum(e.seconds or 0.0 for e in entries) if entries[0].way == OUT else None,
        samples=max(samples.values(), default=None),
        why=None,
        of=sum(entry.of or 1 for entry in entries),
        rounds=trained.total + sum(entry.rounds or 0 for entry in entries) or None,
    )


def _write(file: Path, entries: Sequence[Entry]) -> None:
    """Write a file of entries, whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    with new.open("wb") as opened:
        opened.writelines(map(line_of, entries))
        opened.flush()
        os.fsync(opened.fileno())
    new.replace(file)
