"""Print the history of a node: the sums of each run, and its last rounds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from fedraclora.engines.owner.entries import DATE, OUT, REFUSED, WIRE, Entry
from fedraclora.engines.owner.history import HISTORY, History
from fedraclora.errors import ConfigError

ALL, LAST_ROUNDS = "all", "50"  # which rounds are printed; the second without another word
EARLIER = (0, "earlier")  # the row of messages of which sums are left

Round = tuple[str, int, str]  # digest, Flower's number of the run, round


def print_history(state: Path, which: str = ALL) -> int:
    """Print a row for each run, and one for each of the rounds that are wanted.

    Args:
        state: The folder of the history.
        which: `ALL` rounds, the last ones by their number, or those since a day.

    Raises:
        ConfigError: If there is no history, it cannot be read, or ``which`` is none of these.
    """
    if not (state / HISTORY).is_file():
        raise ConfigError(
            f"--state={state} has no {HISTORY}: no node of this user has kept one there"
        )
    from fedraclora.terminal.tables import TextTable  # with torch, which a node does not wait for

    history = History(state)
    entries = history.entries()
    rounds = dict[Round, list[Entry]]()
    for e in entries:
        run, round_ = (e.run, e.round or "-") if e.of is None else EARLIER
        rounds.setdefault((e.digest, run, round_), []).append(e)
    shown = wanted({key: own for key, own in rounds.items() if key[1:] != EARLIER}, which)
    shown |= {key for key in rounds if key[1:] == EARLIER}
    rows = []
    for digest in dict.fromkeys(entry.digest for entry in entries):
        own = [entry for entry in entries if entry.digest == digest]
        each = {key: history_row(part, key[2]) for key, part in rounds.items() if key[0] == digest}
        known = [row["samples"] for row in each.values() if row["samples"] is not None]
        rows.append({**history_row(own, "all"), "samples": max(known, default=None)})
        rows += [row for key, row in each.items() if key in shown]
    notes = [f"{len(entries)} entries, each in {history.file}"]
    if left := len(rounds) - len(shown):
        notes.insert(0, f"{left} rounds before these are left out: --history=all prints all")
    TextTable.of(rows, notes).print()
    return 0


def wanted(rounds: dict[Round, list[Entry]], which: str) -> set[Round]:
    """Return the rounds that are to be printed.

    Raises:
        ConfigError: If it is not said which.
    """
    latest = sorted(rounds, key=lambda key: rounds[key][0].time)
    if which == ALL:
        return {*latest}
    if which.isdecimal():
        return {*latest[-int(which) :]} if int(which) else set()
    try:
        since = date.fromisoformat(which).isoformat()
    except ValueError as error:
        raise ConfigError(
            f"--history={which}: give the number of the last rounds, a day as 2026-12-31, or all"
        ) from error
    return {key for key in latest if rounds[key][-1].time[:DATE] >= since}


def history_row(entries: Sequence[Entry], round_: str) -> dict[str, Any]:
    """Sum up messages of a run."""
    from fedraclora.terminal.progress import size

    received = sum(entry.bytes for entry in entries if entry.way not in {OUT, WIRE})
    sent = sum(entry.bytes for entry in entries if entry.way == OUT)
    samples = [entry.samples for entry in entries if entry.samples is not None]
    earlier = any(entry.of is not None for entry in entries)  # then the largest is known alone
    return {
        "run": entries[0].digest[:8],
        "round": round_,
        "first (UTC)": entries[0].time[:19].replace("T", " "),
        "received": size(received),
        "sent": size(sent),
        "wire": size(sum(entry.bytes for entry in entries if entry.way == WIRE)),
        "samples": (max(samples) if earlier else sum(samples)) if samples else None,
        "seconds": round(sum(entry.seconds or 0.0 for entry in entries), 1),
        "refused": sum(entry.of or 1 for entry in entries if entry.way == REFUSED),
    }
