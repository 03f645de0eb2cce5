"""Read finished and unfinished runs from the files of their folders, and group them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedraclora.config.unread import as_read
from fedraclora.errors import CheckpointError, ConfigError, unknown
from fedraclora.evaluation.metrics import lower_of
from fedraclora.run import packed
from fedraclora.run.folder import is_finished, read_config, read_summary
from fedraclora.run.ledger import metrics_of, number, read_ledger
from fedraclora.run.statistics import measured_value
from fedraclora.run.stopped import divergence
from fedraclora.terminal.opening import introduction
from fedraclora.weights.files import flatten

RUN_FILES = ("config.yaml", "ledger.jsonl", "summary.json")
# Files by which the output of a comparison, a study or `fedraclora theory` is recognized.
RESULT_FILES = ({"table.md", "table.csv"}, {"study.yaml"}, {"table.md", "theory.json"})
# Keys of quantization errors in a ledger and a summary, relative to the quantized values.
ROUNDING_ERRORS = {"rounding error, up": "rounding_up", "rounding error, down": "rounding_down"}
BEGINS = ("loss", "optimizer", "trained")  # facts of a run's opening that tables show
NOT_THE_RUN = ("seed", "output", "resume", "data.root")  # keys that do not define the experiment


@dataclass(frozen=True)
class RunFiles:
    """A finished or unfinished run, as its files describe it.

    Attributes:
        folder: The run folder.
        config: The resolved config, nested.
        rows: The ledger, in ascending order of rounds.
        summary: The run's ``summary.json``; empty if the run is unfinished.
        diverged: The round in which the run stopped because it diverged, or None.
    """

    folder: Path
    config: dict[str, object]
    rows: list[dict[str, Any]]
    summary: dict[str, object]
    diverged: int | None = None

    @cached_property
    def keys(self) -> dict[str, object]:
        """The config as a flat mapping of dotted keys, without `NOT_THE_RUN`."""
        drop = tuple(f"{key}." for key in NOT_THE_RUN)
        flat = flatten(as_read(self.config))
        return {k: v for k, v in flat.items() if not f"{k}.".startswith(drop)}

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.keys.get("method.name", "unnamed method"))

    @property
    def seed(self) -> object:
        """The seed of the run."""
        return self.config.get("seed")

    @property
    def begins(self) -> dict[str, str]:
        """Loss, optimizer and trained parameters, as text."""
        stored = self.summary.get("begins")
        texts = introduction(stored) if isinstance(stored, dict) else {}
        return {title: texts[title] for title in BEGINS if title in texts}

    @cached_property
    def evaluated(self) -> list[dict[str, Any]]:
        """The rows with metrics."""
        return [row for row in self.rows if row.get("metrics")]

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics, the primary one first."""
        return list(dict.fromkeys(name for row in self.rows for name in metrics_of(row)))

    @property
    def lower(self) -> list[str]:
        """The user's own metrics that are better if lower, according to the summary."""
        return lower_of(self.summary.get("task"))

    def final(self, metric: str) -> float:
        """The last measured value of a metric; NaN if there is none, or if it is not finite."""
        found = (measured_value(row, [metric]) for row in reversed(self.rows))
        return next((value for value in found if value is not None), math.nan)

    @cached_property
    def diverged_at(self) -> int | None:
        """The round from which on the loss was never finite; None if the last loss is finite.

        Other metrics can look valid with NaN weights, which predict the first class throughout.
        """
        if self.diverged is not None:
            return self.diverged
        found = None
        for row in reversed(self.evaluated):
            names = ["loss"] if "loss" in self.metrics else [*row["metrics"]]
            if any(math.isfinite(number(row, "metrics", name)) for name in names):
                break
            found = int(number(row, "round"))
        return found

    @property
    def unfinished(self) -> bool:
        """Whether the run is running or can be resumed."""
        return not self.summary and self.diverged_at is None

    @property
    def last(self) -> int:
        """The last round of the ledger."""
        return int(number(self.rows[-1], "round"))


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Find the run folders at or below some paths, each once, sorted per path.

    Returns:
        The run folders; and the paths without a run, which a pattern like ``runs/*`` may match.

    Raises:
        CheckpointError: If a path does not exist, or no path has a run.
    """
    found: dict[Path, None] = {}
    without = []
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give the folder of a run or of a sweep")
        below = _below(path, _is_run) if path.is_dir() else []
        found |= dict.fromkeys(below)
        if not below:
            without.append(path)
    if without and not found:
        results = [path for path in without if path.is_dir() and _below(path, is_result)]
        why = f"a run folder holds {', '.join(RUN_FILES)}"
        if results == without:
            why = (
                "the folder is the result of a comparison or a study, which keeps figures of "
                "its runs and no run folders"
            )
        raise CheckpointError(
            f"no run in {', '.join(map(str, without))} or below: {why}; give the folder of a run "
            "or of a sweep"
        )
    return list(found), without


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def is_result(folder: Path) -> bool:
    """Check whether a folder is the output of a comparison, a study or `fedraclora theory`."""
    return any(all(packed.exists(folder / name) for name in names) for names in RESULT_FILES)


def refuse_overwriting(out: Path, names: Iterable[str]) -> None:
    """Check that writing files of these names overwrites nothing.

    Raises:
        ConfigError: If the folder has one of them.
    """
    if there := next((name for name in names if (out / name).exists()), None):
        raise ConfigError(
            f"{out} holds {there}, which no comparison or study wrote and which would be "
            "overwritten. Name another folder (--out)."
        )


def _below(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    if wanted(folder):
        return [folder]
    # Hydra writes hidden folders: .hydra/config.yaml is not a run.
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [found for part in parts for found in _below(part, wanted)]


def read_files(folder: Path) -> RunFiles:
    """Read a run folder, and check the ledger of a finished run against its summary.

    Raises:
        CheckpointError: If a file is damaged or no round was written; it names the folder.
    """
    rows = read_ledger(folder / "ledger.jsonl")
    if not rows:
        raise CheckpointError(f"{folder} has no rounds yet: run it again")
    config = dict(read_config(folder))
    if not is_finished(folder):
        return RunFiles(folder, config, rows, {}, divergence(folder))
    return RunFiles(folder, config, rows, read_summary(folder))


_NAME = "method.name"
ABSENT = "absent"
_LONGEST = 40  # characters of settings that make a label


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed, all finished or all unfinished."""

    name: str
    runs: list[RunFiles]

    @property
    def method(self) -> str:
        """The name of the method."""
        return self.runs[0].method

    @property
    def unfinished(self) -> bool:
        """Whether the runs are running or can be resumed."""
        return self.runs[0].unfinished

    @property
    def label(self) -> str:
        """The name; for unfinished runs also the rounds that they have reached."""
        return self.title if self.unfinished else self.name

    @property
    def title(self) -> str:
        """The name, and the state of runs that are unfinished or diverged."""
        return f"{self.name} ({self.state})" if self.state else self.name

    @property
    def seeds(self) -> list[str]:
        """The distinct seeds."""
        return list(dict.fromkeys(str(run.seed) for run in self.runs))

    @property
    def state(self) -> str:
        """The state of unfinished or diverged runs as text; empty if all runs finished."""
        rounds = [run.diverged_at for run in self.runs if run.diverged_at is not None]
        if rounds:
            which = f"{len(rounds)} of {len(self.runs)} " if len(self.runs) > 1 else ""
            return f"{which}diverged (round {min(rounds)})"
        if not self.unfinished:
            return ""
        first, last = min(run.last for run in self.runs), max(run.last for run in self.runs)
        reached = f"round {last}" if first == last else f"rounds {first} to {last}"
        return f"unfinished, {reached} of {self.runs[0].config.get('rounds')}"


def group_runs(runs: Sequence[RunFiles], by: Sequence[str], notes: list[str]) -> list[Group]:
    """Group runs that differ only in their seed, in order of appearance.

    Args:
        runs: The runs. Unfinished runs get groups of their own.
        by: Config keys (in full, or their last part) to group by, besides the method's name; empty
            for all keys that differ, except `NOT_THE_RUN`.
        notes: Receives a line for each group that pools different configs or is named by a folder.

    Returns:
        The groups. A label is the method's name with the keys that differ or, if that is too long,
        the name of a run's folder.

    Raises:
        ConfigError: If a key of ``by`` does not exist, or is ambiguous.
    """
    displayed = [_resolve(key, runs) for key in by] if by else differing(runs)
    whole = sorted({key for run in runs for key in run.keys})
    members_by_key: dict[str, list[RunFiles]] = {}
    for run in runs:
        keys = [_NAME, *displayed] if by else whole
        texts = [*(_text(run, key) for key in keys), str(run.unfinished)]
        members_by_key.setdefault(json.dumps(texts), []).append(run)
    groups = [Group(_label(members[0], displayed), members) for members in members_by_key.values()]
    for group in groups:
        pooled = [key for key in whole if len(values(group.runs, key)) > 1]
        if pooled:
            notes.append(f"{group.label}: pools runs that differ in {', '.join(pooled)}")
    return _named_by_folders(groups, notes)


def _named_by_folders(groups: Sequence[Group], notes: list[str]) -> list[Group]:
    """Name groups with long labels by the folder of their first run."""
    taken = {group.name for group in groups}
    folders = [group.runs[0].folder.resolve().parts for group in groups]
    ends = Counter(parts[-depth:] for parts in folders for depth in range(1, len(parts) + 1))
    found = []
    for group, parts in zip(groups, folders, strict=True):
        if len(group.name) > _LONGEST:
            more = f" and {len(group.runs) - 1} more" if len(group.runs) > 1 else ""
            own = (parts[-depth:] for depth in range(1, len(parts)) if ends[parts[-depth:]] == 1)
            name = "/".join(next(own, parts)) + more
            name = group.name if name in taken else name
            taken.add(name)
            notes.append(f"{name}: {group.name}")
            group = replace(group, name=name)  # noqa: PLW2901
        found.append(group)
    return found


def _resolve(key: str, runs: Sequence[RunFiles]) -> str:
    """Resolve an abbreviated config key to the full dotted key."""
    known = {name for run in runs for name in run.keys}
    found = [key] if key in known else sorted(n for n in known if n.endswith(f".{key}"))
    if not found:
        if key.partition(".")[0] in NOT_THE_RUN:
            raise ConfigError(
                f"{key!r} cannot group runs: runs that differ only in it are always one group. "
                "Leave it out."
            )
        raise unknown("config key", key, known)
    if len(found) > 1:
        raise ConfigError(f"config key {key!r} may mean {' or '.join(found)}; write it in full")
    return found[0]


def differing(runs: Sequence[RunFiles]) -> list[str]:
    """List the config keys that distinguish the runs, besides the method's name.

    A key of a named section (``data.labels``) is left out if it differs only because the names
    differ; a hyperparameter that all methods have (``method.rank``) is listed.
    """
    keys = dict.fromkeys(key for run in runs for key in run.keys if key != _NAME)
    distinguishing = []
    for key in keys:
        name = f"{key.partition('.')[0]}.name"
        if key == name or not any(name in run.keys for run in runs):
            differs = len(values(runs, key)) > 1
        else:
            alike = [[r for r in runs if _text(r, name) == n] for n in values(runs, name)]
            shared = name == _NAME and all(key in run.keys for run in runs)
            differs = any(len(values(part, key)) > 1 for part in [*alike, *([runs] * shared)])
        if differs:
            distinguishing.append(key)
    return sorted(distinguishing, key=lambda key: not key.startswith("method."))


def values(runs: Iterable[RunFiles], key: str) -> list[str]:
    """List the distinct values of a config key as text, in order of appearance."""
    return list(dict.fromkeys(_text(run, key) for run in runs))


def _text(run: RunFiles, key: str) -> str:
    if key not in run.keys:
        return ABSENT
    value = run.keys[key]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _label(run: RunFiles, keys: Sequence[str]) -> str:
    parts = [run.method]
    for key in keys:
        if key in run.keys and key != _NAME:
            short = key.removeprefix("method.").removesuffix(".name")
            parts.append(f"{short}={_text(run, key)}")
    return " ".join(parts)
