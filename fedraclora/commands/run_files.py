"""Read run folders, one or in groups, from their files only."""

from __future__ import annotations

import json
import math
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
# By which a folder is known that a comparison, a study or `fedraclora theory` has written.
RESULT_FILES = ({"table.md", "table.csv"}, {"study.yaml"}, {"table.md", "theory.json"})
# Of a ledger and a summary: what numbers in fewer bits were off by, relative to what was rounded.
ROUNDING_ERRORS = {"rounding error, up": "rounding_up", "rounding error, down": "rounding_down"}
BEGINS = ("loss", "optimizer", "trained")  # of what a run says first, what it is shown with
NOT_THE_RUN = ("seed", "output", "resume", "data.root")  # where and which draw, not what


@dataclass(frozen=True)
class RunFiles:
    """A run, finished or not.

    Attributes:
        folder: Its folder.
        config: The resolved config, nested.
        rows: The ledger, in ascending order of rounds.
        summary: The run's ``summary.json``; empty where it is unfinished.
        diverged: The round in which a run diverged that stopped for it; None if it did not.
    """

    folder: Path
    config: dict[str, object]
    rows: list[dict[str, Any]]
    summary: dict[str, object]
    diverged: int | None = None

    @cached_property
    def keys(self) -> dict[str, object]:
        """The config as dotted keys, without `NOT_THE_RUN`."""
        drop = tuple(f"{key}." for key in NOT_THE_RUN)
        flat = flatten(as_read(self.config))
        return {k: v for k, v in flat.items() if not f"{k}.".startswith(drop)}

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.keys.get("method.name", "unnamed method"))

    @property
    def seed(self) -> object:
        """Seed of the run."""
        return self.config.get("seed")

    @property
    def begins(self) -> dict[str, str]:
        """Loss, optimizer and what is trained, in words."""
        found = self.summary.get("begins")
        said = introduction(found) if isinstance(found, dict) else {}
        return {title: said[title] for title in BEGINS if title in said}

    @cached_property
    def evaluated(self) -> list[dict[str, Any]]:
        """The rows that have metrics."""
        return [row for row in self.rows if row.get("metrics")]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of the run, the first one first."""
        return list(dict.fromkeys(name for row in self.rows for name in metrics_of(row)))

    @property
    def lower(self) -> list[str]:
        """Metrics of the user's own of which less is better, as the summary says."""
        return lower_of(self.summary.get("task"))

    def final(self, metric: str) -> float:
        """The metric where it was last measured; NaN where it was not, or is not finite."""
        found = (measured_value(row, [metric]) for row in reversed(self.rows))
        return next((value for value in found if value is not None), math.nan)

    @cached_property
    def diverged_at(self) -> int | None:
        """The round from which on the run has no finite loss, to its end; None if it has one.

        A metric can look sound with weights that are not: the classes of NaN are all the first.
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
        """Return whether the run goes on, or can."""
        return not self.summary and self.diverged_at is None

    @property
    def last(self) -> int:
        """The last round in the ledger."""
        return int(number(self.rows[-1], "round"))


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Find run folders: the paths themselves, or all below them; each once, sorted per path.

    Returns:
        The runs; and the paths that have none: ``runs/*`` names those, too.

    Raises:
        CheckpointError: If a path does not exist, or if there is no run at all.
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
    """Check whether a comparison, a study or `fedraclora theory` has written a folder."""
    return any(all(packed.exists(folder / name) for name in names) for names in RESULT_FILES)


def refuse_overwriting(out: Path, names: Iterable[str]) -> None:
    """Reject a folder for results that has a file of somebody else's under one of these names.

    Raises:
        ConfigError: Naming it.
    """
    if there := next((name for name in names if (out / name).exists()), None):
        raise ConfigError(
            f"{out} holds {there}, which no comparison or study wrote and which would be "
            "overwritten. Name another folder (--out)."
        )


def _below(folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    if wanted(folder):
        return [folder]
    # Hidden folders are Hydra's own: .hydra/config.yaml is not a run.
    parts = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [found for part in parts for found in _below(part, wanted)]


def read_files(folder: Path) -> RunFiles:
    """Read a run; that of a finished one is checked to have the ledger of its summary.

    Raises:
        CheckpointError: Naming the folder, if a file is damaged or no round has been written.
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
    """Runs that differ in their seed: all at their end, or all on the way."""

    name: str
    runs: list[RunFiles]

    @property
    def method(self) -> str:
        """Name of their method."""
        return self.runs[0].method

    @property
    def unfinished(self) -> bool:
        """Return whether the runs go on, or can."""
        return self.runs[0].unfinished

    @property
    def label(self) -> str:
        """The name, and where unfinished runs are."""
        return self.title if self.unfinished else self.name

    @property
    def title(self) -> str:
        """The name, and how the runs ended if that is worth saying."""
        return f"{self.name} ({self.state})" if self.state else self.name

    @property
    def seeds(self) -> list[str]:
        """The different seeds."""
        return list(dict.fromkeys(str(run.seed) for run in self.runs))

    @property
    def state(self) -> str:
        """How the runs ended, in words; empty where nothing is to be said."""
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
    """Part runs into groups, in order of appearance.

    Args:
        runs: Runs; those that are unfinished have groups of their own.
        by: Config keys (in full, or their last part) that part the groups besides the method's
            name; none: all keys that differ, but seed and output.
        notes: Takes a line for each group that pools different configs, or has a folder's name.

    Returns:
        The groups; their labels are the method's name and the keys that differ, or, where that is
        long, the name of the run's folder.

    Raises:
        ConfigError: If a key of ``by`` does not exist, or may mean several.
    """
    shown = [_resolve(key, runs) for key in by] if by else differing(runs)
    whole = sorted({key for run in runs for key in run.keys})
    parted: dict[str, list[RunFiles]] = {}
    for run in runs:
        keys = [_NAME, *shown] if by else whole
        texts = [*(_text(run, key) for key in keys), str(run.unfinished)]
        parted.setdefault(json.dumps(texts), []).append(run)
    groups = [Group(_label(members[0], shown), members) for members in parted.values()]
    for group in groups:
        pooled = [key for key in whole if len(values(group.runs, key)) > 1]
        if pooled:
            notes.append(f"{group.label}: pools runs that differ in {', '.join(pooled)}")
    return _named_by_folders(groups, notes)


def _named_by_folders(groups: Sequence[Group], notes: list[str]) -> list[Group]:
    """Give groups whose settings are too long for a label the name of their first run's folder."""
    taken = {group.name for group in groups}
    found = []
    for group in groups:
        if len(group.name) > _LONGEST:
            parts = group.runs[0].folder.resolve().parts
            more = f" and {len(group.runs) - 1} more" if len(group.runs) > 1 else ""
            names = ["/".join(parts[-depth:]) + more for depth in range(1, len(parts) + 1)]
            name = next((name for name in names if name not in taken), group.name)
            taken.add(name)
            notes.append(f"{name}: {group.name}")
            group = replace(group, name=name)  # noqa: PLW2901
        found.append(group)
    return found


def _resolve(key: str, runs: Sequence[RunFiles]) -> str:
    """Find the dotted key that ``key`` means: itself, or the one that ends in it."""
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
    """The keys that tell the groups apart, besides the method's name.

    A key of a named section (``method.rank``, ``data.labels``) that differs only because the
    names differ says nothing that the name does not say; a hyperparameter that methods share
    does.
    """
    keys = dict.fromkeys(key for run in runs for key in run.keys if key != _NAME)
    shown = []
    for key in keys:
        name = f"{key.partition('.')[0]}.name"
        if key == name or not any(name in run.keys for run in runs):
            differs = len(values(runs, key)) > 1
        else:
            alike = [[r for r in runs if _text(r, name) == n] for n in values(runs, name)]
            shared = name == _NAME and all(key in run.keys for run in runs)
            differs = any(len(values(part, key)) > 1 for part in [*alike, *([runs] * shared)])
        if differs:
            shown.append(key)
    return sorted(shown, key=lambda key: not key.startswith("method."))


def values(runs: Iterable[RunFiles], key: str) -> list[str]:
    """List the different values of a config key as text, in order of appearance."""
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
