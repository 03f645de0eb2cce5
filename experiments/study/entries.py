"""The rows of a study with their final runs, ranked; and rows that one study takes from another."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedraclora.binding import Plain, bind, section
from fedraclora.experiments.study.file import Study
from fedraclora.experiments.study.tuning import Done, Line, final_lines, score, tuned_value
from fedraclora.protocol.method import Method
from fedraclora.run.ledger import Row, number
from fedraclora.strategies import METHODS

UNTRAINED = "before its first evaluation"  # in the place of a figure that only training gives
DEVIATION = "± deviation"  # behind the title of a column: standard deviation over seeds


def docstring(kind: type[Method]) -> str:
    """Return the docstring of a method's module, where its formulas and its sources stand."""
    return sys.modules[kind.__module__].__doc__ or ""


def is_unverified(kind: type[Method]) -> bool:
    """Check whether a method's docstring names what was not verified."""
    return "- Unverified:" in docstring(kind)


def uplink(point: Row) -> float:
    """Bytes that all clients have sent so far."""
    return number(point, "uplink_total")


def traffic(point: Row) -> float:
    """Bytes sent both ways so far, with catch-up."""
    return uplink(point) + number(point, "downlink_total")


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Write the mean, and the standard deviation of more values than one."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def of_runs(values: Sequence[float], runs: int, digits: int) -> str:
    """Write mean and deviation of the runs that have a value, and how many of all these are."""
    return mean_and_deviation(values, digits) + of_all(len(values), runs)


def of_all(there: object, all_: object, what: str = "runs") -> str:
    """Say how many of all have a figure, where not all have."""
    return "" if there == all_ else f" ({there} of {all_} {what})"


def mean_of_known(values: Iterable[float]) -> float:
    """Mean of the finite values; NaN if there is none."""
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def first_reaching(points: Sequence[Row], metric: str, target: float) -> Row | None:
    """Find the first measured round whose metric (more is better) is no worse than a target."""
    return next((p for p in points if score(p, metric) >= target), None)


def is_exact(config: Plain) -> bool:
    """Check that a run's method is exact, and that nothing else stands before the new weights.

    Args:
        config: Of the run; what it lacks beside the method is plain.

    Raises:
        ConfigError: If the method is none of this version's.
    """
    method: Method = bind("method", METHODS, section(config, "method"))()
    plain = {"aggregator": "mean", "server_optimiser": "none", "privacy": "none"}
    chosen = {key: config.get(key) for key in plain}
    named = {key: group.get("name") for key, group in chosen.items() if isinstance(group, Mapping)}
    return method.traits.exact and named.items() <= plain.items()


ROUND_OFF = 1e-12  # relative, of float64: the error of one client that is averaged with no other


def shown_error(exact: bool, measured: float) -> str:
    """Say how far aggregates were from the mean of the clients' weights, relative to their change.

    Args:
        exact: The method's trait, to which the contract suite holds it.
        measured: The error; NaN where the run did not measure it.
    """
    if exact:
        return "exact"
    if math.isnan(measured):
        return "not measured"
    return f"{measured:.3g}" if measured > ROUND_OFF else "0"


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
    lines: Sequence[Line]
    value: float

    @property
    def title(self) -> str:
        """The row, which says so where the metric is that of clients' own models."""
        return f"{self.row} (clients' own models)" if self.personal else self.row

    @property
    def curves(self) -> list[list[Row]]:
        """The rounds at which the metric was measured, per seed; a few have generated answers."""
        names = {self.study.metric, f"personal_{self.study.metric}"}
        return [
            [
                point
                for point in line["curve"]
                if not point["metrics"] or names & {*point["metrics"]}
            ]
            for line in self.lines
        ]

    @property
    def seeds(self) -> list[int]:
        """Of the final runs."""
        return [int(line["seed"]) for line in self.lines]

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

    @property
    def personal(self) -> bool:
        """Return whether the clients have models of their own, which were measured."""
        metrics = self.lines[0]["metrics"]
        return bool(metrics) and self.study.metric not in metrics

    @cached_property
    def method(self) -> Method:
        """The method, as the runs had it."""
        return bind("method", METHODS, self.lines[0]["config"]["method"])()

    @cached_property
    def exact(self) -> bool:
        """Return whether the new weights are the mean of the clients'; see `is_exact`."""
        return is_exact(self.lines[0]["config"])

    @property
    def aggregation_error(self) -> str:
        """The error of aggregation over rounds and seeds, in words where it is none or unknown."""
        measured = self.average(lambda line: number(line, "aggregation_error"))
        return shown_error(self.exact, measured)

    def average(self, figure: Callable[[Line], float]) -> float:
        """Mean of a figure over the seeds that have it; NaN if none has."""
        return mean_of_known(map(figure, self.lines))


def finals(study: Study, done: Done) -> list[Entry]:
    """List the rows whose final runs are all there, in the study's order."""
    return [
        Entry(study, row, lines, tuned_value(study, row, done))
        for row in study.rows
        if (lines := final_lines(study, row, done))
    ]


def entries(study: Study, done: Done) -> list[Entry]:
    """List the rows whose final runs are all there and did not diverge, the best first."""
    stable = [entry for entry in finals(study, done) if math.isfinite(entry.mean)]
    return sorted(stable, key=lambda entry: (entry.personal, -entry.mean))


def notes_of(
    study: Study, shown: Sequence[Entry], done: Done, failed: Mapping[str, str]
) -> list[str]:
    """Say which rows of a study a table does not have, and what its runs took.

    Args:
        study: The study.
        shown: The rows of the table.
        done: Lines of its runs, by key.
        failed: Why rows failed just now, by row.
    """
    there = {entry.row for entry in shown}
    missing = [row for row in study.rows if row not in there and row not in failed]
    notes = [f"Failed: {why}." for why in failed.values()]
    if missing:
        notes.append(f"Not run to the end, or diverged at every value: {', '.join(missing)}.")
    return [*notes, spent] if (spent := cost(done)) else notes


def cost(done: Done) -> str:
    """Sum the processor time of a study's runs, tuning included, where lines say it."""
    known = [line["cpu_seconds"] for line in done.values() if "cpu_seconds" in line]
    if not known:
        return ""
    rest = f"; {len(done) - len(known)} more did not count it" if len(known) < len(done) else ""
    spent = sum(known)
    took = f"{spent / 3600:.2f} core-hours" if spent >= 360 else f"{spent:.0f} seconds of a core"
    return f"{len(known)} runs, tuning included, took {took}{rest}."
