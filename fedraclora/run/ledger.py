"""Write the ledger: one line of JSON per round, append-only; all tables and plots use it.

A killed writer leaves at most one unfinished last line, which every reader ignores. Each line ends
with a checksum of its row and all earlier rows, which every reader checks, so that every change is
detected. The checksum of the last row is also in the checkpoint and the summary.

Columns that the seed does not determine (`NONDETERMINISTIC`) are not part of the ledger's digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.errors import CheckpointError
from fedraclora.run.stored_rows import SEAL, StoredRow, StoredRows
from fedraclora.weights.files import keep_private, make_folder, naming_file, replacing

Row = StoredRow
BY_CLIENTS = "clients."  # prefix of clients' metrics
SEAL_BYTES = hashlib.sha256().digest_size

NONDETERMINISTIC = frozenset(
    {
        "seconds",
        "cpu_seconds",
        "peak_memory_bytes",
        "timestamp",
        "incidents",
        "transport",
        "transport_bytes",
    }
)


class Ledger:
    """The rows of a run, in a file or in memory.

    An existing file is continued: its rows are read, and an unfinished last line is removed.

    Args:
        path: The file, or None to keep the rows in memory only.

    Attributes:
        rows: All rows so far, exactly as a reader of the file sees them.

    Raises:
        CheckpointError: If the file exists and is damaged elsewhere than in its last line.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        rows, data = list[Row](), b""
        if path is not None and path.exists():
            data = path.read_bytes()
            rows = _parse(data, path)
        lengths = (len(line) + 1 for line in data.split(b"\n")[: len(rows)])
        self.rows: Sequence[Row] = (
            rows if path is None else StoredRows(path, rows, accumulate(lengths))
        )
        self._rounds = array("q", map(_round, rows))
        self._seals = bytearray(b"".join(map(bytes.fromhex, seals(rows))))
        if data and not data.endswith(b"\n"):
            self._cut(len(rows))

    def append(self, row: Mapping[str, object], *, sync: bool = True) -> None:
        """Add the row of one round and write it.

        Args:
            row: Column names to JSON values, numpy or torch numbers and arrays. NaN and
                infinities become null. Key order is kept: the first metric is the primary one.
            sync: Flush to the disk before returning (else only to the operating system).

        Raises:
            CheckpointError: If ``row["round"]`` is not an integer above the last row's, or a
                value cannot be written.
        """
        round_, last = row.get("round"), self._rounds[-1] if self._rounds else None
        if not isinstance(round_, int) or (isinstance(last, int) and round_ <= last):
            raise CheckpointError(
                f"ledger {self.path or ''}: round={round_!r} of a row is not an integer above "
                f"{last}. To write a round again, cut the ledger first"
            )
        plain = {str(key): ledger_value(value, str(key)) for key, value in row.items()}
        text = json.dumps(plain, allow_nan=False)
        seal = _seal(self.seal(), text)
        line = _line(text, seal)
        if self.path is not None:
            if not self.rows:
                make_folder(self.path.parent)
                self.path.touch()
                keep_private(self.path)
            with naming_file(self.path), self.path.open("ab") as file:
                file.write(line)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        if isinstance(self.rows, StoredRows):
            self.rows.append(plain, len(line))
        elif isinstance(self.rows, list):
            self.rows.append(plain)
        self._rounds.append(round_)
        self._seals += bytes.fromhex(seal)

    def seal(self, round_: int | None = None) -> str:
        """Compute the checksum of all rows up to a round, with every column; empty without rows."""
        count = len(self.rows) if round_ is None else bisect_right(self._rounds, round_)
        return self._seals[(count - 1) * SEAL_BYTES : count * SEAL_BYTES].hex() if count else ""

    def has(self, row: Mapping[str, object]) -> bool:
        """Check whether a row is there, with every column."""
        at = bisect_left(self._rounds, _round(row))
        return at < len(self.rows) and self.rows[at] == row

    def cut(self, round_: int) -> None:
        """Drop the rows of all rounds after ``round_``, so that the run can be resumed there."""
        if (count := bisect_right(self._rounds, round_)) < len(self.rows):
            self._cut(count)

    def _cut(self, count: int) -> None:
        """Keep the first rows alone."""
        if isinstance(self.rows, StoredRows):
            with replacing(self.rows.path) as partial, self.rows.path.open("rb") as file:
                kept = file.read(self.rows.end(count))
                # A kill may have cut the last line right before its end.
                partial.write_bytes(kept + b"\n" * bool(kept and not kept.endswith(b"\n")))
            self.rows.cut(count)
        else:
            self.rows = self.rows[:count]
        del self._rounds[count:], self._seals[count * SEAL_BYTES :]

    def digest(self) -> str:
        """Hash the deterministic columns of all rows; see `digest_rows`."""
        return digest_rows(self.rows)


def read_ledger(path: Path) -> list[Row]:
    """Read the rows of a ledger file, without an unfinished last line.

    Raises:
        CheckpointError: If the file is missing or damaged; the message names file and line.
    """
    if not path.is_file():
        raise CheckpointError(
            f"there is no ledger {path}. Check that {path.parent} is the folder of a run"
        )
    return _parse(path.read_bytes(), path)


def reached_round(folder: Path) -> int:
    """Return the last round of a run's ledger; 0 without rows."""
    ledger = folder / "ledger.jsonl"
    rows = read_ledger(ledger) if ledger.is_file() else []
    return int(number(rows[-1], "round")) if rows else 0


def digest_rows(rows: Iterable[Mapping[str, object]]) -> str:
    """Hash rows without their `NONDETERMINISTIC` columns (SHA-256, hexadecimal).

    Example:
        >>> fast, slow = {"round": 1, "seconds": 0.1}, {"round": 1, "seconds": 9.0}
        >>> digest_rows([fast]) == digest_rows([slow])
        True
        >>> digest_rows([fast]) == digest_rows([{"round": 2, "seconds": 0.1}])
        False
    """
    h = hashlib.sha256()
    for row in rows:
        fixed = {key: value for key, value in row.items() if key not in NONDETERMINISTIC}
        h.update(json.dumps(fixed, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return h.hexdigest()


def seals(rows: Iterable[Mapping[str, object]]) -> Iterator[str]:
    """Compute the checksum at each row: of all its columns, and of all earlier rows."""
    before = ""
    for row in rows:
        before = _seal(before, json.dumps(row))
        yield before


def number(row: Mapping[str, object], *path: str) -> float:
    """Read one number of a row; NaN if it is missing, null or not a number.

    The metric ``clients.accuracy.worst10`` is a clients' metric.

    Example:
        >>> number({"round": 1, "metrics": {"accuracy": 0.5}}, "metrics", "accuracy")
        0.5
    """
    value: object = row
    if path[:1] == ("metrics",) and path[-1].startswith(BY_CLIENTS):
        path = tuple(path[-1].split("."))
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def metrics_of(row: Mapping[str, object]) -> dict[str, object]:
    """Collect the metrics of a row by name: those of the server, then those of clients.

    Example:
        >>> spread = {"mean": 0.5, "worst10": 0.25}
        >>> metrics_of({"metrics": {"loss": 2.0}, "clients": {"accuracy": spread, "n": 3}})
        {'loss': 2.0, 'clients.accuracy.mean': 0.5, 'clients.accuracy.worst10': 0.25}
    """
    own, theirs = row.get("metrics"), row.get("clients")
    found: dict[str, object] = dict(own) if isinstance(own, Mapping) else {}
    for name, spread in theirs.items() if isinstance(theirs, Mapping) else ():
        if isinstance(spread, Mapping):
            found |= {f"{BY_CLIENTS}{name}.{key}": value for key, value in spread.items()}
    return found


def column(rows: Sequence[Mapping[str, object]], *path: str) -> npt.NDArray[np.float64]:
    """Read one number of every row, float64 [rows]; see `number`."""
    return np.array([number(row, *path) for row in rows], dtype=np.float64)


def reported_figures(rows: Iterable[Row]) -> list[str]:
    """List the figures that a method or a step of the rounds reports, sorted.

    Example:
        >>> reported_figures([{"round": 1}, {"round": 2, "report": {"aggregation_error": 0.1}}])
        ['aggregation_error']
    """
    reports = (row.get("report") for row in rows)
    return sorted({name for report in reports if isinstance(report, dict) for name in report})


def known_mean(rows: Sequence[Mapping[str, object]], *path: str) -> float:
    """Average a number over the rows that have it; NaN if none has.

    Example:
        >>> known_mean([{"loss": 1.0}, {}, {"loss": 2.0}], "loss")
        1.5
    """
    values = column(rows, *path)
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def round_seconds(row: Mapping[str, object]) -> float:
    """Return the wall-clock seconds of a round: ``seconds.total``, or the sum of its parts.

    Example:
        >>> round_seconds({"round": 1, "seconds": {"open": 0.5, "train": 1.0}})
        1.5
    """
    laps = row.get("seconds")
    if not isinstance(laps, Mapping):
        return 0.0
    values = [number(laps, name) for name in (["total"] if "total" in laps else laps)]
    return math.fsum(value for value in values if math.isfinite(value))


def headline(rows: Sequence[Mapping[str, object]]) -> str | None:
    """Return the name of the first metric of the first evaluated row, or None.

    Example:
        >>> headline([{"round": 1}, {"round": 2, "metrics": {"f1": 0.5, "loss": 1.0}}])
        'f1'
    """
    for row in rows:
        metrics = row.get("metrics")
        if isinstance(metrics, Mapping) and metrics:
            return str(next(iter(metrics)))
    return None


def _parse(data: bytes, path: Path) -> list[Row]:
    rows: list[Row] = []
    seal = ""
    lines = data.split(b"\n")
    for index, line in enumerate(lines):
        last = index == len(lines) - 1
        try:
            row = json.loads(line)
            least = _round(rows[-1]) + 1 if rows else 0
            if not isinstance(row, dict) or _round(row) < least:
                raise ValueError(f"a row must be a mapping with a round from {least} on")
            claimed = row.pop(SEAL, None)
            seal = _seal(seal, json.dumps(row))
            if claimed != seal:
                raise ValueError("its checksum does not match, or an earlier row is missing")
        except ValueError as error:
            if last:
                break  # after the last newline: nothing, or the incomplete line of a killed run
            raise CheckpointError(
                f"{path}, line {index + 1} is damaged ({error}); restore the file from a copy, "
                "or cut the run back to an earlier checkpoint"
            ) from error
        rows.append(row)
    return rows


def _round(row: Mapping[str, object]) -> int:
    value = row.get("round")
    return value if isinstance(value, int) else -1


def _line(text: str, seal: str) -> bytes:
    """Write a row as JSON, followed by its checksum."""
    return f'{text[:-1]}, "{SEAL}": "{seal}"}}\n'.encode()


def _seal(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}|{text}".encode()).hexdigest()


def ledger_value(value: object, where: str) -> object:
    """Convert a value to JSON: numpy and torch numbers to Python's, non-finite ones to null.

    Args:
        value: The value.
        where: Its column, for the message.

    Raises:
        CheckpointError: If JSON has no such value, or no float is as large.
    """
    if value is None or isinstance(value, str):
        return value if value is None else str(value)
    if isinstance(value, int):
        if abs(value) > sys.float_info.max:
            raise CheckpointError(
                f"column {where}: the ledger cannot store an integer of {value.bit_length()} "
                "bits. Convert it to a float or a text"
            )
        return value
    if isinstance(value, float):  # numpy's double, too
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        return ledger_value(value.tolist(), where)
    if isinstance(value, Mapping):
        return {str(key): ledger_value(part, f"{where}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [ledger_value(part, where) for part in value]
    raise CheckpointError(
        f"column {where}: the ledger cannot store a {type(value).__name__}. "
        "Use numbers, texts, lists or dicts"
    )


def withheld(row: Mapping[str, object]) -> str:
    """Return why a row lacks clients' metrics; empty if none is withheld."""
    clients = row.get("clients")
    why = clients.get("withheld") if isinstance(clients, Mapping) else None
    return f"what clients measured is withheld: {why}" if why else ""
