"""The rows of a study with their final runs, ranked; and rows that one study takes from another."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from experiments.study.file import Study
from experiments.study.run import read_lines
from experiments.study.table import (
    curve_of,
    final_lines,
    first_reaching,
    is_personal,
    score,
    tuned_value,
)
from fedraclora.config.schema import bind
from fedraclora.errors import ConfigError, unknown
from fedraclora.protocol.method import Method
from fedraclora.run.ledger import Row
from strategies import METHODS

Plain = dict[str, object]


def docstring(kind: type[Method]) -> str:
    """Give the docstring of a method's module, where its formulas and its sources stand."""
    return sys.modules[kind.__module__].__doc__ or ""


def is_unverified(kind: type[Method]) -> bool:
    """Tell whether a method's docstring names what was not verified."""
    return "- Unverified:" in docstring(kind)


@dataclass(frozen=True)
class Entry:
    """A row of a study with its final runs.

    Attributes:
        study: The study.
        row: Its name.
        lines: Of its final runs, one per seed.
        value: The tuned value.
    """

    study: Study
    row: str
    lines: Sequence[Plain]
    value: float

    @cached_property
    def scores(self) -> list[float]:
        """The metric at the end, per seed."""
        return [score(line, self.study.metric) for line in self.lines]

    @property
    def mean(self) -> float:
        """Its mean; minus infinity if a seed diverged."""
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float:
        """Its standard deviation over the seeds; NaN for one seed, or where one diverged."""
        whole = len(self.scores) > 1 and math.isfinite(self.mean)
        return statistics.stdev(self.scores) if whole else math.nan

    @cached_property
    def personal(self) -> bool:
        """Whether the clients have models of their own."""
        return is_personal(self.lines[0], self.study.metric)

    @cached_property
    def method(self) -> Method:
        """The method, as the runs had it."""
        config = self.lines[0]["config"]
        if not isinstance(config, dict):
            raise TypeError(f"{self.lines[0]['key']} has no config")
        return bind("method", METHODS, config["method"])()

    def average(self, figure: Callable[[Plain], float]) -> float:
        """Mean of a figure over the seeds that have it; NaN if none has."""
        known = [x for x in map(figure, self.lines) if math.isfinite(x)]
        return statistics.fmean(known) if known else math.nan

    def reached(self) -> list[Row]:
        """Where runs first were as good as the target, of the seeds that got there."""
        target = math.inf if self.study.target is None else self.study.target
        found = [first_reaching(curve_of(x), self.study.metric, target) for x in self.lines]
        return [point for point in found if point is not None]


def entries(study: Study, done: Mapping[str, Plain]) -> list[Entry]:
    """Give the rows whose final runs are all there and did not diverge, the best first.

    Args:
        study: The study.
        done: Lines of its runs, by key.
    """
    found = [
        Entry(study, row, lines, tuned_value(study, row, done))
        for row in study.rows
        if (lines := final_lines(study, row, done))
    ]
    stable = [entry for entry in found if math.isfinite(entry.mean)]
    return sorted(stable, key=lambda entry: (entry.personal, -entry.mean))


def best_rows(study: Study, results: Path) -> Study:
    """Fill in the rows that a study takes over from another by its results.

    ``best: {of: NAME, rows: N, beside: [ROW, ...], without: [ROW, ...]}`` takes the N best rows of
    the study whose results lie in ``results/NAME``, and those named beside them. A row of the
    same name in the study itself wins. Clients' own models are not ranked, and so not taken.

    Args:
        study: A study; without ``best`` it is given as it is.
        results: The folder of all results.

    Raises:
        ConfigError: If the other study has not run to its end, or the reference is none of them.
    """
    if study.best is None:
        return study
    said = dict(study.best)
    folder = results / str(said["of"])
    if not folder.is_dir():
        raise ConfigError(
            f"the study takes its rows from the results of {said['of']}, and {folder} is not "
            "there: a checkout has it, a wheel has no results; name the rows yourself, in a study "
            "file of your own"
        )
    other, done = Study.read(folder / "study.yaml"), read_lines(folder / "runs.jsonl")
    ranked = entries(other, done)
    missing = [r for r in other.rows if not final_lines(other, r, done)]
    if missing:
        raise ConfigError(f"the study in {folder} has no final runs of {', '.join(missing)} yet")
    beside, without = (_names(said.get(key, [])) for key in ("beside", "without"))
    fit = [e.row for e in ranked if not e.personal and e.row not in {*beside, *without}]
    kept = [*fit[: int(str(said["rows"]))], *beside]
    if study.reference not in {None, *kept}:
        raise unknown("row as reference", study.reference, kept)
    return study.changed(more={row: list(other.rows[row]) for row in kept}, only=kept)


def _names(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []
