"""Reading run folders back: everything here comes from the files of a run, never from memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PureWindowsPath

import numpy as np
import yaml

from fedraclora.checkpoint import flatten
from fedraclora.errors import CheckpointError
from fedraclora.ledger import Row, column, digest_rows, number, read_ledger, round_seconds

RUN_FILES = ("config.yaml", "ledger.jsonl", "summary.json")
NOT_THE_RUN = ("seed", "output", "resume", "data.root")  # where and which draw, not what
_CURVE_STEP = 10


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: Its folder.
        config: The resolved config, nested.
        rows: The ledger, in ascending order of rounds.
        summary: The run's ``summary.json``.
    """

    folder: Path
    config: dict[str, object]
    rows: list[Row]
    summary: dict[str, object]

    @cached_property
    def keys(self) -> dict[str, object]:
        """The config as dotted keys, without `NOT_THE_RUN`."""
        drop = tuple(f"{key}." for key in NOT_THE_RUN)
        flat = flatten(self.config)
        return {k: v for k, v in flat.items() if not f"{k}.".startswith(drop)}

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.keys.get("method.name", "unnamed method"))

    @property
    def seed(self) -> object:
        """Seed of the run."""
        return self.config.get("seed")

    @cached_property
    def evaluated(self) -> list[Row]:
        """The rows that have metrics."""
        return [row for row in self.rows if isinstance(m := row.get("metrics"), Mapping) and m]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of the run, the first one first."""
        found = [m for row in self.evaluated if isinstance(m := row["metrics"], Mapping)]
        return list(dict.fromkeys(str(name) for names in found for name in names))

    def final(self, metric: str) -> float:
        """The metric at the last evaluated round; NaN where it is missing or not finite."""
        return number(self.evaluated[-1], "metrics", metric) if self.evaluated else math.nan

    @cached_property
    def totals(self) -> dict[str, float]:
        """Sums over all rounds: bytes (``downlink_bytes`` with catch-up), clients, seconds."""
        return {
            "uplink_bytes": number(self.rows[-1], "uplink_total"),
            "downlink_bytes": number(self.rows[-1], "downlink_total"),
            "catchup_bytes": float(np.nansum(column(self.rows, "catchup_bytes"))),
            "client_rounds": float(np.nansum(column(self.rows, "cohort"))),
            "failures": float(sum(len(_items(row.get("failures"))) for row in self.rows)),
            "seconds": math.fsum(round_seconds(row) for row in self.rows),
        }

    @cached_property
    def aggregation_error(self) -> tuple[float, float]:
        """Aggregation error at the last round that has it, and its mean; NaN where none has."""
        values = column(self.rows, "report", "aggregation_error")
        known = values[np.isfinite(values)]
        return (float(known[-1]), float(known.mean())) if known.size else (math.nan, math.nan)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Find run folders: the paths themselves, or all below them; each once, sorted per path.

    Raises:
        CheckpointError: If a path does not exist or has no run.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; give the folder of a run or of a sweep")
        below = _runs_below(path)
        if not below:
            raise CheckpointError(
                f"no run in {path} or below it; a run folder holds {', '.join(RUN_FILES)}"
            )
        found |= dict.fromkeys(below)
    return list(found)


def _runs_below(folder: Path) -> list[Path]:
    if any((folder / name).is_file() for name in RUN_FILES):
        return [folder]
    # Hidden folders are Hydra's own: .hydra/config.yaml is not a run.
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [run for part in parts for run in _runs_below(part)]


def read_run(folder: Path) -> Run:
    """Read a finished run, and check that its ledger is the one of its summary.

    Raises:
        CheckpointError: Naming the folder, if the run is unfinished or a file is damaged.
    """
    config = _read_mapping(folder / "config.yaml")
    rows = read_ledger(folder / "ledger.jsonl")
    last = number(rows[-1], "round") if rows else math.nan
    if not (folder / "summary.json").is_file():
        raise CheckpointError(
            f"{folder} is unfinished: {len(rows)} rows of {config.get('rounds')} rounds and no "
            f"summary.json; continue it with resume={folder}"
        )
    summary = _read_mapping(folder / "summary.json")
    if not rows:
        raise CheckpointError(f"{folder} is broken: its ledger has no rows; run it again")
    if number(summary, "rounds") != last:
        raise CheckpointError(
            f"{folder}: the ledger ends at round {last:g}, the summary at round "
            f"{summary.get('rounds')}; the run goes on, or continue it with resume={folder}"
        )
    if summary.get("ledger_digest", digest_rows(rows)) != digest_rows(rows):
        raise CheckpointError(
            f"{folder} is broken: ledger.jsonl was changed after the run (its digest is not the "
            "summary's); restore it from a copy or run it again"
        )
    return Run(folder, config, rows, summary)


def _read_mapping(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path.parent} is broken: cannot read {path.name}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path.parent} is broken: {path.name} is not a mapping")
    return found


def result_summary(run_folder: Path) -> dict[str, object]:
    """Condense a run to a small JSON value that a results folder can keep.

    Output settings are left out of its config, and absolute paths keep their last part only, so
    that nothing of the machine is in it.

    Args:
        run_folder: The folder of a finished run.

    Returns:
        Config, final metrics, totals, digests, versions, and a curve: the evaluated rows that
        are 10 rounds or more apart, and the last.

    Raises:
        CheckpointError: See `read_run`.
    """
    run = read_run(run_folder)
    last, mean = run.aggregation_error
    kept = {k: v for k, v in run.config.items() if k not in {"output", "resume"}}
    copied = ("uplink_floats", "weights_digest", "ledger_digest", "versions", "git")
    return {
        "config": _portable(kept),
        "rounds": run.rows[-1]["round"],
        "metrics": run.evaluated[-1]["metrics"] if run.evaluated else {},
        "totals": {k: v if math.isfinite(v) else None for k, v in run.totals.items()},
        **({"aggregation_error": {"last": last, "mean": mean}} if math.isfinite(last) else {}),
        **{key: run.summary[key] for key in copied if key in run.summary},
        "curve": _curve(run.evaluated),
    }


def _curve(rows: Sequence[Row]) -> list[Row]:
    columns = ("round", "metrics", "train_loss", "uplink_total", "downlink_total")
    kept: list[Row] = []
    for row in rows:
        due = not kept or number(row, "round") - number(kept[-1], "round") >= _CURVE_STEP
        if due or row is rows[-1]:
            kept.append({key: row[key] for key in columns if key in row})
    return kept


def _portable(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k): _portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if isinstance(value, str) and (
        PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    ):
        return PureWindowsPath(value).name  # reads both kinds of separator
    return value


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []
