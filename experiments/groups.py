"""Runs that belong together, and the shortest label that tells them from the others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from fedraclora.errors import ConfigError, unknown
from fedraclora.experiments.reports import Run

_NAME = "method.name"
_ABSENT = "absent"
_LONGEST = 40  # characters of settings that make a label


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed: all at their end, or all on the way."""

    name: str
    runs: list[Run]

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


def group_runs(runs: Sequence[Run], by: Sequence[str], notes: list[str]) -> list[Group]:
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
    shown = [_resolve(key, runs) for key in by] if by else _differing(runs)
    whole = sorted({key for run in runs for key in run.keys})
    parted: dict[str, list[Run]] = {}
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


def _resolve(key: str, runs: Sequence[Run]) -> str:
    """Find the dotted key that ``key`` means: itself, or the one that ends in it."""
    known = {name for run in runs for name in run.keys}
    found = [key] if key in known else sorted(n for n in known if n.endswith(f".{key}"))
    if not found:
        raise unknown("config key", key, known)
    if len(found) > 1:
        raise ConfigError(f"config key {key!r} may mean {' or '.join(found)}; write it in full")
    return found[0]


def _differing(runs: Sequence[Run]) -> list[str]:
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


def values(runs: Iterable[Run], key: str) -> list[str]:
    """List the different values of a config key as text, in order of appearance."""
    return list(dict.fromkeys(_text(run, key) for run in runs))


def _text(run: Run, key: str) -> str:
    if key not in run.keys:
        return _ABSENT
    value = run.keys[key]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _label(run: Run, keys: Sequence[str]) -> str:
    parts = [run.method]
    for key in keys:
        if key in run.keys and key != _NAME:
            short = key.removeprefix("method.").removesuffix(".name")
            parts.append(f"{short}={_text(run, key)}")
    return " ".join(parts)
