"""Read a study's runs row by row: tuned values, and final runs over all seeds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedraclora.binding import Plain, bind, section
from fedraclora.commands.study.file import Study, check_split, row_config, row_method
from fedraclora.errors import ConfigError
from fedraclora.evaluation.metrics import higher_is_better, lower_of
from fedraclora.protocol.method import Method
from fedraclora.run import packed
from fedraclora.run.ledger import number
from fedraclora.run.statistics import (
    Spread,
    measured,
    measured_value,
    metric_names,
    ranks,
    rounds_of,
    traffic,
)
from fedraclora.strategies.methods import METHODS

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Line = dict[str, Any]  # a line of runs.jsonl
Done = Mapping[str, Line]  # the lines of finished runs, by key


def read_lines(path: Path) -> dict[str, Line]:
    """Read the lines of finished runs by key, also from a packed file; skip a truncated line."""
    done: dict[str, Line] = {}
    if packed.exists(path):
        for text in packed.read_text(path).splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            done[line["key"]] = line
    return done


def read_results(folder: Path) -> tuple[Study, dict[str, Line]]:
    """Read the study of a folder, and the lines of its finished runs, by key.

    Raises:
        ConfigError: If the folder has no valid study.
    """
    return Study.read(folder / "study.yaml"), read_lines(folder / "runs.jsonl")


def score(line: Mapping[str, Any], metric: str) -> float:
    """Return a run's final metric, or that of its clients' own models; -inf if it diverged.

    Raises:
        ConfigError: If the run did not measure the metric.
    """
    metrics = line["metrics"]
    if not metrics:
        return -math.inf
    if (value := measured_value(dict(line), metric_names(metric))) is not None:
        return value
    raise ConfigError(
        f"a run has no metric {metric}; its metrics are {', '.join(metrics)}: name one of them as "
        "the study's metric (what has run is kept)"
    )


def mean_score(study: Study, row: str, value: float, done: Done) -> float:
    """Score a grid value on the validation split; 0 if the study tunes nothing.

    The score is the mean of ``Study.chosen_by`` over the tuning seeds, negated for a loss.
    """
    lines = [done[job.key] for job in study.jobs("tune", row, [value])]
    lower = [name for line in lines for name in lower_of(line.get("task"))]
    sign = 1 if higher_is_better(study.chosen_by, lower) else -1
    found = [score(line, study.chosen_by) for line in lines]
    # A diverged run ranks last, also for losses.
    scores = [sign * s if math.isfinite(s) else -math.inf for s in found]
    return Spread.of(scores).mean if scores else 0.0


def best_value(study: Study, row: str, values: list[float], done: Done) -> float:
    """Choose the value with the best score on the validation split (the smallest in a tie)."""
    return max(values, key=lambda v: (mean_score(study, row, v, done), -v))


def tried_values(study: Study, row: str, done: Done) -> list[float]:
    """List the values of the coarse grid, and the refined ones around the best of them."""
    coarse = study.values(row)
    return [*coarse, *study.refined(best_value(study, row, coarse, done))]


def tuned_value(study: Study, row: str, done: Done) -> float:
    """Return the best value of the coarse grid and its refinement.

    If a final run diverged at a value, the next best one is chosen: the tuning seeds do not show
    every instability, and a mean over diverged runs is meaningless.
    """
    tried = tried_values(study, row, done)
    stable = [v for v in tried if not diverged(study, row, v, done)]
    return best_value(study, row, stable or tried, done)


def tuned_by(study: Study, folder: Path) -> Study:
    """Fix the values that another study has tuned for the same rows.

    Args:
        study: The study to run.
        folder: The results of the other study.

    Raises:
        ConfigError: If the other study has not tuned every row on a validation split.
    """
    other, done = read_results(folder)
    missing = [r for r in study.rows if r not in other.rows or not is_tuned(other, r, done)]
    if missing:
        raise ConfigError(f"the study in {folder} has not tuned {', '.join(missing)}")
    for row in study.rows:
        if (config := row_config(other, row, "tune")) is not None:
            check_split(other, "tune", config)
    fixed = {row: tuned_value(other, row, done) for row in study.rows}
    return study.changed(tune=None, fixed=fixed)


def diverged(study: Study, row: str, value: float, done: Done) -> bool:
    """Check whether a final run with this value diverged."""
    return any("diverged" in done.get(j.key, {}) for j in study.jobs("final", row, [value]))


def shown_value(study: Study, row: str, value: float, done: Done) -> str:
    """Write a tuned value, marked if it may not be the best.

    At an edge of the grid, a better value may lie outside. In a tie the smallest value is chosen;
    if nothing was learned, all values tie.
    """
    if study.tune is None:
        return f"{value:g}"
    tried = tried_values(study, row, done)
    good = mean_score(study, row, value, done)
    level = {v for v in tried if v != value and mean_score(study, row, v, done) == good}
    marks = ["edge of the grid"] if value in {min(tried), max(tried)} else []
    marks += [f"tied with {', '.join(f'{v:g}' for v in sorted(level))}"] if level else []
    return f"{value:g} ({'; '.join(marks)})" if marks else f"{value:g}"


def is_tuned(study: Study, row: str, done: Done) -> bool:
    """Check whether all tuning runs of a row have finished."""

    def ran(values: list[float]) -> bool:
        return all(job.key in done for job in study.jobs("tune", row, values))

    return ran(study.values(row)) and ran(tried_values(study, row, done))


def dropped(study: Study, done: Done) -> list[str]:
    """List the rows that get no final runs, since rows of the same method dominate them.

    These are the rows beyond the first ``final.ranks`` Pareto ranks by traffic and
    ``Study.chosen_by`` at the tuned value. The reference is always kept.
    """
    most = study.final.get("ranks")
    if most is None or study.tune is None:
        return []
    rows = [row for row in study.rows if is_tuned(study, row, done)]
    groups: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        value = tuned_value(study, row, done)
        lines = [done[job.key] for job in study.jobs("tune", row, [value])]
        score_of_row = mean_score(study, row, value, done)
        if math.isfinite(score_of_row):
            traffic_of_row = Spread.of(map(traffic, lines))
            groups.setdefault(row_method(study, row), {})[row] = score_of_row, -traffic_of_row.mean
    return [
        row
        for found in groups.values()
        for row, rank in zip(found, ranks([*found.values()]), strict=True)
        if rank >= most and row != study.reference
    ]


def final_lines(study: Study, row: str, done: Done) -> list[Line]:
    """Return the final runs of a row at its tuned value; empty until all have finished."""
    if not is_tuned(study, row, done):
        return []
    jobs = study.jobs("final", row, [tuned_value(study, row, done)])
    lines = [done[job.key] for job in jobs if job.key in done]
    return lines if len(lines) == len(jobs) and "uplink_floats" in lines[0] else []


UNTRAINED = "before its first evaluation"  # the cell of a run with no evaluation in the budget
DEVIATION = "± deviation"  # suffix of a column's title: standard deviation over seeds


def docstring(kind: type[Method]) -> str:
    """Return the docstring of a method's module, with its formulas and sources."""
    return sys.modules[kind.__module__].__doc__ or ""


def of_all(there: object, all_: object, what: str = "runs") -> str:
    """Write how many of all runs have a value, unless all have."""
    return "" if there == all_ else f" ({there} of {all_} {what})"


def is_exact(config: Plain) -> bool:
    """Check whether the new weights of a run's rounds are exactly the clients' weighted mean.

    Args:
        config: The run's config. Missing keys have their defaults, which are exact.

    Raises:
        ConfigError: If this version has no such method.
    """
    method: Method = bind("method", METHODS, section(config, "method"))()
    plain = {"aggregator": "mean", "server_optimizer": "none", "privacy": "none"}
    chosen = {key: config.get(key) for key in plain}
    named = {key: group.get("name") for key, group in chosen.items() if isinstance(group, Mapping)}
    return method.traits.exact and named.items() <= plain.items()


ROUND_OFF = 1e-12  # relative round-off of float64, such as the mean of one client's weights has


def shown_error(exact: bool, measured: float) -> str:
    """Format the aggregation error: the distance to the clients' mean, relative to its change.

    Args:
        exact: Whether the aggregation is exact, as the contract tests verify.
        measured: The measured error; NaN if the run did not measure it.
    """
    if exact:
        return "exact"
    if math.isnan(measured):
        return "not measured"
    return f"{measured:.3g}" if measured > ROUND_OFF else "0"


@dataclass(frozen=True)
class RowResult:
    """A row of a study with its final runs.

    Attributes:
        study: The study.
        row: The row's name.
        lines: Lines of the final runs, one per seed.
        value: The tuned value.
    """

    study: Study
    row: str
    lines: Sequence[Line]
    value: float

    @property
    def title(self) -> str:
        """The row's name, marked if its metric is that of clients' own models."""
        return f"{self.row} (clients' own models)" if self.personal else self.row

    @cached_property
    def rounds(self) -> DataFrame:
        """The rounds with a metric, by seed (`statistics.rounds_of`)."""
        curves = {int(line["seed"]): line.get("curve", ()) for line in self.lines}
        return measured(rounds_of(curves, metric_names(self.study.metric)))

    @cached_property
    def scores(self) -> Series:
        """The final metric, by seed."""
        from pandas import Series

        found = {int(line["seed"]): score(line, self.study.metric) for line in self.lines}
        return Series(found, dtype=float)

    @cached_property
    def spread(self) -> Spread:
        """Mean and deviation of the final metric over seeds; the mean is -inf if a run diverged."""
        return Spread.of(self.scores)

    def scores_after(self, round_: int) -> Series:
        """Return the metric after a round, by seed."""
        return self.rounds[self.rounds["round"] == round_].set_index("run")["value"]

    @property
    def personal(self) -> bool:
        """Whether the clients have personal models, whose metric is used."""
        metrics = self.lines[0]["metrics"]
        return bool(metrics) and self.study.metric not in metrics

    @cached_property
    def method(self) -> Method:
        """The method, as configured in the runs."""
        return bind("method", METHODS, self.lines[0]["config"]["method"])()

    @property
    def method_name(self) -> str:
        """The name of the method."""
        return str(self.lines[0]["config"]["method"]["name"])

    @cached_property
    def exact(self) -> bool:
        """Whether the aggregation is exact (`is_exact`)."""
        return is_exact(self.lines[0]["config"])

    @property
    def aggregation_error(self) -> str:
        """The mean aggregation error as text; "exact" or "not measured" without one."""
        return shown_error(self.exact, self.average("aggregation_error"))

    def average(self, key: str) -> float:
        """Average a number of the lines over the seeds that have it; NaN if none has."""
        return Spread.of_known(number(line, key) for line in self.lines).mean


def finals(study: Study, done: Done) -> list[RowResult]:
    """List the rows whose final runs have all finished, in the study's order."""
    return [
        RowResult(study, row, lines, tuned_value(study, row, done))
        for row in study.rows
        if (lines := final_lines(study, row, done))
    ]


def entries(study: Study, done: Done) -> list[RowResult]:
    """List the rows whose final runs have all finished without divergence, the best first."""
    stable = [entry for entry in finals(study, done) if math.isfinite(entry.spread.mean)]
    return sorted(stable, key=lambda entry: (entry.personal, -entry.spread.mean))


def study_notes(
    study: Study, shown: Sequence[RowResult], done: Done, failed: Mapping[str, str]
) -> list[str]:
    """Write notes about the rows that a table lacks, and about the cost of the study.

    Args:
        study: The study.
        shown: The rows of the table.
        done: Lines of finished runs, by key.
        failed: Reasons of rows that just failed, by row.
    """
    shown_rows = {entry.row for entry in shown}
    beaten = [row for row in dropped(study, done) if row not in shown_rows]
    missing = [row for row in study.rows if row not in {*shown_rows, *failed, *beaten}]
    notes = [f"Failed: {why}." for why in failed.values()]
    if beaten:
        notes.append(
            "Not run to the end, since other rows of their method were as good in fewer bytes "
            f"where all were tuned: {', '.join(beaten)}."
        )
    if missing:
        notes.append(f"Not run to the end, or diverged at every value: {', '.join(missing)}.")
    return [*notes, spent] if (spent := cost(done)) else notes


def cost(done: Done) -> str:
    """Sum the recorded processor time of a study's runs, tuning included, as text."""
    known = [line["cpu_seconds"] for line in done.values() if "cpu_seconds" in line]
    if not known:
        return ""
    rest = f"; {len(done) - len(known)} more did not count it" if len(known) < len(done) else ""
    spent = sum(known)
    amount = f"{spent / 3600:.2f} core-hours" if spent >= 360 else f"{spent:.0f} seconds of a core"
    return f"{len(known)} runs, tuning included, took {amount}{rest}."
