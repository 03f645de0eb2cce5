"""Read and check the YAML file of a study: a preset, rows to compare, a tuning grid, seeds.

`fedraclora.tuning` searches with Optuna. A study has a fixed grid instead, so that every row is
tuned on the same values, and its results are a text file rather than a database.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedraclora.compose.overrides import composed
from fedraclora.compose.presets import take_own
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.errors import ConfigError, unknown
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.strategies.methods import METHODS
from fedraclora.weights.files import flatten

KEYS = {"experiment", "metric", "grid", "final", "rows"}
OPTIONAL = {"tune", "reference", "overrides", "reported"}
OPTIONAL |= {"target", "varied", "budget", "fixed", "more", "only"}
SECTIONS = {  # name -> required and optional keys
    "grid": ({"key", "values"}, {"refine", "scale"}),
    "tune": ({"seeds"}, {"overrides", "by"}),
    "final": ({"seeds"}, {"overrides", "more", "ranks"}),
}


@dataclass(frozen=True)
class Job:
    """One run of a study."""

    phase: str  # tune | final
    row: str
    value: float
    seed: int
    overrides: tuple[str, ...]

    @property
    def key(self) -> str:
        """The identifier of the run in runs.jsonl."""
        return f"{self.phase}|{self.row}|{self.value}|{self.seed}"


@dataclass(frozen=True)
class Study:
    """The contents of a study's YAML file.

    Attributes:
        experiment: Preset of all runs.
        metric: The metric that is tuned and reported.
        grid: The tuned key and its values; ``refine``, factors of the best value to try next;
            ``scale``, a factor of all values, by row.
        final: Seeds and overrides of the final runs; ``more``, further seeds of some rows;
            ``ranks``, the number of Pareto ranks of each method's rows, by traffic and tuning
            metric, that get final runs (None: all).
        rows: The overrides of each row, by name.
        text: The text of the file.
        tune: Seeds and overrides of the tuning runs, and ``by``, the metric to tune by, such as
            ``loss``, if it is not ``metric``; None if the grid has one value for all rows.
        reference: The row to compare the others with, by final metric and traffic.
        overrides: Overrides of all runs.
        reported: Metrics that a paper reports, by row, to be shown next to ours.
        target: A value of the metric; a leaderboard shows the rounds and bytes to reach it.
        budget: The row whose uplink and traffic are the budgets of comparisons at equal bytes;
            None for the cheapest row.
        varied: Keys of `SHARED` that rows may differ in, since the study is about them.
        fixed: Tuned values of another study, by row, in place of the grid's.
    """

    experiment: str | None
    metric: str
    grid: Mapping[str, Any]
    final: Mapping[str, Any]
    rows: Mapping[str, Sequence[str]]
    text: str
    tune: Mapping[str, object] | None = None
    reference: str | None = None
    overrides: Sequence[str] = ()
    reported: Mapping[str, float] = field(default_factory=dict)
    target: float | None = None
    budget: str | None = None
    varied: Sequence[str] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        path: Path,
        overrides: Sequence[str] = (),
        metric: str | None = None,
        tuning: Sequence[str] = (),
    ) -> Study:
        """Read a study, and apply changes, which become part of `text`.

        Args:
            path: The YAML file.
            overrides: Further overrides of all runs.
            metric: A metric in place of the file's.
            tuning: Further overrides of the tuning runs.

        Raises:
            ConfigError: If the file is not a YAML mapping, or keys are missing or unknown; or if
                there are overrides of tuning runs in a study without tuning.
        """
        if not path.is_file():
            raise ConfigError(f"there is no study {path}: see experiments/studies")
        take_own(path)
        study = cls.parse(path.read_text(), path, {})
        if overrides:
            study = study.changed(overrides=[*study.overrides, *overrides])
        if tuning:
            if study.tune is None:
                raise ConfigError(f"{path} has no tune, but keys for tuning: {' '.join(tuning)}")
            own = _list(study.tune["overrides"])
            study = study.changed(tune={**study.tune, "overrides": [*own, *tuning]})
        return study if metric is None else study.changed(metric=metric)

    def changed(self, **keys: object) -> Study:
        """Return a copy with other values of some keys, which become part of `text`.

        Two keys are not in files: ``more`` adds rows, and ``only`` names the rows to keep.

        Raises:
            ConfigError: If the result is not a valid study.
        """
        return self.parse(self.text, Path("the study"), keys)

    @classmethod
    def parse(cls, text: str, path: Path, more: Mapping[str, object]) -> Study:
        """Parse the text of a study, and replace the values of some keys.

        Args:
            text: YAML.
            path: The file, for error messages.
            more: New values, by key.

        Raises:
            ConfigError: See `read`.
        """
        text = text.rstrip("\n") + "\n"
        text += "".join(f"{key}: {json.dumps(value)}\n" for key, value in more.items())
        try:
            loaded = dict(yaml.safe_load(text))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not a study: {error}") from error
        for key in loaded:
            if key not in KEYS | OPTIONAL:
                raise unknown("study key", key, KEYS | OPTIONAL)
        if KEYS - set(loaded):
            raise ConfigError(
                f"the study {path} lacks the keys {', '.join(sorted(KEYS - set(loaded)))}"
            )
        loaded["fixed"] = loaded.get("fixed") or {}
        _sections(path, loaded)
        loaded["rows"] = {**loaded.pop("more", {}), **loaded["rows"]}
        _check(path, loaded)
        _keep(loaded, loaded.pop("only", None))
        return cls(**loaded, text=text)

    @property
    def chosen_by(self) -> str:
        """The metric by which values are tuned on the validation split."""
        return self.metric if self.tune is None else str(self.tune.get("by", self.metric))

    def jobs(self, phase: str, row: str, values: Sequence[float]) -> list[Job]:
        """List the runs of a row in a phase."""
        section = self.tune if phase == "tune" else self.final
        if section is None:
            return []
        seeds, extra = _list(section["seeds"]), section["overrides"]
        if phase == "final":
            seeds = [*seeds, *_list((self.final.get("more") or {}).get(row, []))]
        preset = [f"experiment={self.experiment}"] if self.experiment else []
        common = [*preset, *self.overrides, *self.rows[row], *map(str, _list(extra))]
        return [
            Job(phase, row, v, int(str(s)), (*common, f"{self.grid['key']}={v}", f"seed={s}"))
            for v in values
            for s in seeds
        ]

    def values(self, row: str) -> list[float]:
        """Compute the coarse grid of a row: the grid's values times the row's scale."""
        if row in self.fixed:
            return [self.fixed[row]]
        factor = float(self.grid.get("scale", {}).get(row, 1))
        return [round(factor * float(str(v)), 9) for v in _list(self.grid["values"])]

    def refined(self, best: float) -> list[float]:
        """Return the values to try around the best one of the coarse grid."""
        factors = [] if self.fixed else _list(self.grid.get("refine", []))
        return [round(best * float(str(f)), 9) for f in factors]


def _sections(path: Path, loaded: dict[str, Any]) -> None:
    """Check the sections of a study's file, and add missing overrides as empty lists."""
    for name, (needed, more) in SECTIONS.items():
        if loaded.get(name) is None and name == "tune":
            continue
        section = loaded[name]
        if not isinstance(section, Mapping) or needed - section.keys():
            raise ConfigError(
                f"{name} of {path} is {section!r:.200}, but must be a mapping with the keys "
                f"{', '.join(sorted(needed))}"
            )
        if extra := section.keys() - needed - more:
            raise unknown(f"key of {name}", min(map(str, extra)), needed | more)
        if "overrides" in more:
            loaded[name] = section = {"overrides": [], **section}
        if "overrides" in more:
            _list(section["overrides"], f"{name}.overrides of {path}")
        for key in {"values", "refine", "seeds"} & section.keys():
            where = f"{name}.{key} of {path}"
            _numbers(section[key], where, int if key == "seeds" else float)
            if not section[key] and key != "refine":
                raise ConfigError(f"{where} is empty: give one or more")
    for key in {"overrides", "varied"} & loaded.keys():
        _list(loaded[key], f"{key} of {path}")
    if loaded.get("target") is not None:
        _numbers([loaded["target"]], f"target of {path}", float)
    _numbers([*loaded["fixed"].values()], f"fixed of {path}", float)
    loaded["fixed"] = {row: float(str(value)) for row, value in loaded["fixed"].items()}
    loaded["rows"] = loaded["rows"] or {}
    if not isinstance(loaded["rows"], Mapping):
        raise ConfigError(f"rows of {path} is {loaded['rows']!r:.200}, but must be a mapping")
    for row, overrides in loaded["rows"].items():
        _list(overrides, f"row {row!r} of {path}")


def refuse_lower(where: object, metric: str, lower: Collection[str]) -> None:
    """Check that higher values of a study's metric are better."""
    if not higher_is_better(metric, lower):
        raise ConfigError(
            f"{where} has the metric {metric}, of which less is better, but studies choose the "
            "greatest value. Use accuracy for classes, pearson or spearman for numbers."
        )


def _check(path: Path, loaded: Mapping[str, Any]) -> None:
    """Check the row names, seeds and values in a study's file."""
    refuse_lower(path, str(loaded["metric"]), ())
    by_row = {"grid.scale": loaded["grid"].get("scale"), "reported": loaded.get("reported")}
    by_row |= {"final.more": loaded["final"].get("more"), "fixed": loaded["fixed"]}
    for key, group in by_row.items():
        for row in group or ():
            if row not in loaded["rows"]:
                raise unknown(f"row of {key}", row, loaded["rows"])
    for row, seeds in (loaded["final"].get("more") or {}).items():
        if twice := set(_list(seeds)) & set(_list(loaded["final"]["seeds"])):
            raise ConfigError(
                f"final.more of {path} repeats the seed {min(map(str, twice))} for {row}: give "
                "further seeds only"
            )
    for key in ("reference", "budget"):
        if loaded.get(key) not in {None, *loaded["rows"]}:
            raise unknown(f"row as {key}", loaded[key], loaded["rows"])
    without_value = [row for row in loaded["rows"] if row not in loaded["fixed"]]
    if without_value and loaded.get("tune") is None and len(loaded["grid"]["values"]) != 1:
        raise ConfigError(
            f"{path} has no tune, but grid.values is {loaded['grid']['values']}. Give one value "
            f"for all rows, name that of {without_value[0]} under fixed, or add tune."
        )


def _keep(loaded: dict[str, Any], only: Sequence[str] | None) -> None:
    """Remove the rows that ``only`` does not name, and references to them."""
    if only is None:
        return
    for row in only:
        if row not in loaded["rows"]:
            raise unknown("row", row, loaded["rows"])
    loaded["rows"] = {row: how for row, how in loaded["rows"].items() if row in only}
    for key in ("reference", "budget"):
        if loaded.get(key) not in loaded["rows"]:
            loaded[key] = None


def _list(value: object, where: str = "a key of a study") -> list[object]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} is {value!r:.200}, but must be a list")
    return value


def _numbers(value: object, where: str, kind: Callable[[str], float]) -> None:
    """Check that all elements are finite numbers (YAML reads 1e-3 as text, which is accepted)."""
    wanted = "whole numbers" if kind is int else "numbers"
    try:
        right = all(math.isfinite(kind(str(number))) for number in _list(value, where))
    except ValueError:
        right = False
    if not right:
        raise ConfigError(f"{where} is {value!r:.200}, but must be {wanted}")


SHARED: list[str] = yaml.safe_load(
    Path(__file__).with_name("same.yaml").read_text(encoding="utf-8")
)


def check_same(study: Study) -> None:
    """Compose a final run of every row, and check that the conditions of all rows are equal.

    Args:
        study: A study; keys of its ``varied`` may differ.

    Raises:
        ConfigError: If a row is invalid, or differs from the first one in a key of `SHARED`.
    """
    shared = tuple(f"{key}." for key in SHARED)
    free = tuple(f"{key}." for key in study.varied)
    first: tuple[str, dict[str, object]] | None = None
    for row in study.rows:
        try:
            config = row_config(study, row, "final")
        except ConfigError as error:
            raise ConfigError(f"row {row!r}: {error}") from error
        if config is None:
            continue
        found = {
            key: value
            for key, value in flatten(config.digested).items()
            if f"{key}.".startswith(shared) and not f"{key}.".startswith(free)
        }
        first = first or (row, found)
        for key in sorted({*first[1], *found}):
            actual, expected = found.get(key), first[1].get(key)
            if actual != expected:
                raise ConfigError(
                    f"row {row!r} has {key}={actual}, row {first[0]!r} has {key}={expected}; all "
                    f"rows of a comparison share it: move it to overrides, or name it under varied"
                )


def check_split(study: Study, phase: str, config: RunConfig) -> None:
    """Check that a row is tuned on the validation split, and that its final runs are not.

    Args:
        study: The study.
        phase: ``tune`` or ``final``.
        config: The config of one of the row's runs in this phase.

    Raises:
        ConfigError: If the run evaluates the wrong split.
    """
    if study.tune is None:
        return
    if phase == "tune" and config.evaluate.split != "validation":
        raise ConfigError(
            f"its tuning runs are measured on evaluate.split={config.evaluate.split}, so its "
            "final runs would be evaluated on the samples they were tuned on. Add "
            "evaluate.split=validation and data.validation=0.2, say, to tune.overrides."
        )
    if phase == "final" and config.evaluate.split == "validation":
        raise ConfigError(
            "its final runs are evaluated on evaluate.split=validation, on which it is tuned: "
            "remove that from overrides and final.overrides"
        )


def row_config(study: Study, row: str, phase: str) -> RunConfig | None:
    """Compose the first run of a row in a phase; None if it has none."""
    jobs = study.jobs(phase, row, study.values(row)[:1])
    return composed_run(jobs[0]) if jobs else None


def row_method(study: Study, row: str) -> str:
    """Return the name of a row's method, from its overrides or its preset."""
    preset = [f"experiment={study.experiment}"] if study.experiment else []
    words = [*preset, *study.overrides, *study.rows[row]]
    named = [word for word in words if word.startswith("method=")]
    if named:
        return named[-1].removeprefix("method=")
    return _preset_method(tuple(word for word in words if word.startswith("experiment="))[-1:])


@cache
def _preset_method(words: tuple[str, ...]) -> str:
    return str(from_plain(composed(words), METHODS).choices["method"])


def composed_run(job: Job) -> RunConfig:
    """Compose the config of a run."""
    return from_plain(composed(job.overrides), METHODS)
