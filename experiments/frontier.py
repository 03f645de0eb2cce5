"""The frontier of quality against bytes: rows of several studies of a task, put together.

    python -m fedraclora.experiments.frontier [--out FOLDER]

``frontier.yaml`` names the tasks. Of each row the mean over its seeds is taken, round by round, of
the metric (beside the reference's on the same seeds) and of the bytes both ways with catch-up. The
reference is a row in float32; a share is what a row has sent where its mean first is as good
as the reference's at the end, over all that the reference sends. The best rows are chosen by what
is shown, on either side.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedraclora.commands import RESULTS
from fedraclora.commands.status import reported
from fedraclora.commands.study.entries import RowResult, entries, read_results
from fedraclora.commands.study.file import SHARED
from fedraclora.errors import ConfigError
from fedraclora.plots.axes import MEGABYTE
from fedraclora.plots.frontier import GOOD, frontier_figure, shares_figure
from fedraclora.run.statistics import (
    Spread,
    first_reaching,
    frontier,
    last,
    last_within,
    mean_curve,
    paired,
)
from fedraclora.terminal.tables import TextTable
from fedraclora.weights.files import flatten

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SETUP = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
FAMILIES: dict[str, str] = SETUP["families"]
OTHER = "other rivals"
ORDER = (*dict.fromkeys(FAMILIES.values()), OTHER)  # so that a family has one color everywhere
OURS = ORDER[0]
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the reference's traffic
SUMMARY = 0.5  # the budget of the table that stands in the README
FREE = "evaluate.every"  # of the groups that rows share: when they are measured


@dataclass(frozen=True)
class Task:
    """The rows of a task.

    Attributes:
        name: Its name.
        entries: All rows whose runs are there and did not diverge, the reference among them.
        reference: The row that they are held against.
    """

    name: str
    entries: Mapping[str, RowResult]
    reference: RowResult

    @classmethod
    def read(cls, name: str, setup: Mapping[str, Any], results: Path = RESULTS) -> Task:
        """Put the rows of some studies together.

        Raises:
            ConfigError: If two rows have one name, or differ in what a comparison shares, or the
                reference is not there.
        """
        found: dict[str, RowResult] = {}
        shared: dict[str, object] = {}
        for folder in setup["studies"]:
            for entry in entries(*read_results(results / folder)):
                if entry.row in found:
                    raise ConfigError(f"{folder}: another study of {name} has a row {entry.row!r}")
                told_by = flatten(entry.lines[0]["config"])
                config = {k: _alone(v) for k, v in told_by.items() if _shared(k)}
                known = shared.keys() & config.keys()  # rows of before lack later keys
                if wrong := sorted(key for key in known if shared[key] != config[key]):
                    raise ConfigError(
                        f"{folder}: row {entry.row!r} has {wrong[0]}={config[wrong[0]]}, other "
                        f"rows of {name} have {shared[wrong[0]]}; they are not compared alike"
                    )
                shared |= config
                found[entry.row] = entry
        if setup["reference"] not in found:
            raise ConfigError(
                f"{name}: the runs of the reference {setup['reference']!r} are missing"
            )
        return cls(name, found, found[setup["reference"]])

    @cached_property
    def curves(self) -> DataFrame:
        """The mean over the seeds of each row, by row (``run``), but of the untrained model.

        Added to the metric is what the reference's end has on all of its seeds beyond that on the
        row's: so a row of fewer seeds is held against the same runs.

        Raises:
            ConfigError: If a row has no seed of the reference.
        """
        import pandas as pd

        end, means = self.final, []
        for row, entry in self.entries.items():
            own = end[end.index.intersection(entry.scores.index)]
            if own.empty:
                raise ConfigError(f"row {row!r} has no seed of {self.reference.row!r}")
            more = Spread.of(end).mean - Spread.of(own).mean
            curve = mean_curve(entry.rounds, row)
            means.append(curve.assign(value=curve["value"] + more)[curve["round"] > 0])
        return pd.concat(means)

    @cached_property
    def final(self) -> Series:
        """The metric of the reference at its end, by seed."""
        return self.reference.scores_after(mean_curve(self.reference.rounds, "")["round"].max())

    @cached_property
    def whole(self) -> float:
        """Bytes that the reference sends in all."""
        return float(last(self.curves)["traffic"][self.reference.row])

    @cached_property
    def target(self) -> float:
        """Its metric at the end."""
        return float(last(self.curves)["value"][self.reference.row])

    def of(self, rows: Iterable[str]) -> DataFrame:
        """Return the curves of some rows."""
        return self.curves[self.curves["run"].isin([*rows])]

    def leading(self, rows: Iterable[str]) -> Series | None:
        """Find the row that is as good as the reference at its end in the fewest bytes, if any."""
        reached = first_reaching(self.of(rows), self.target)
        return None if reached.empty else reached.loc[reached["traffic"].idxmin()]

    def best_within(self, rows: Iterable[str], share: float) -> Series | None:
        """Find the row that is best within a share of the reference's traffic, if any."""
        within = last_within(self.of(rows), share * self.whole)
        return None if within.empty else within.loc[within["value"].idxmax()]

    def sides(self) -> tuple[list[str], list[str]]:
        """Part our rows from the rivals', without the reference itself."""
        others = [row for row in self.entries if row != self.reference.row]
        ours = [row for row in others if self.family(row) == OURS]
        return ours, [row for row in others if row not in ours]

    def family(self, row: str) -> str:
        """Under whose colour a row is drawn."""
        config = self.entries[row].lines[0]["config"]
        return FAMILIES.get(str(config["method"]["name"]), OTHER)

    def rows_of(self, family: str) -> list[str]:
        """List the rows of a family."""
        return [row for row in self.entries if self.family(row) == family]


def _alone(value: object) -> object:
    """Take a word out of a list of one, as older rows have it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _shared(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{k}." for k in SHARED)) and not key.startswith(FREE)


def difference(one: Series, other: Series) -> str:
    """Write the mean difference over seeds that both have, in points, with its standard error."""
    found = paired(100 * one, 100 * other)
    return f"{found.mean:+.1f} ± {found.error:.1f}" if found.count else "-"


def shares(task: Task) -> dict[str, object]:
    """Say how little traffic takes ours, and the best rival, to the reference's final metric."""
    ours, rivals = map(task.leading, task.sides())
    record: dict[str, object] = {
        "task": task.name,
        "metric": task.reference.study.metric,
        f"{task.family(task.reference.row)}, float32": f"{task.target:.3f}",
        "its MB": f"{task.whole / MEGABYTE:.4g}",
    }
    for title, found in (("ours", ours), ("best rival", rivals)):
        if found is None:
            record |= {title: "none gets there", f"{title}, %": "", f"{title}, points there": ""}
            continue
        there = task.entries[found.name].scores_after(found["round"])
        record |= {
            title: found.name,
            f"{title}, %": f"{100 * found['traffic'] / task.whole:.2g}",
            f"{title}, points there": difference(there, task.final),
        }
    record["ours / rival"] = ""
    if ours is not None and rivals is not None:
        record["ours / rival"] = f"{ours['traffic'] / rivals['traffic']:.2f}"
    return record


def winners(task: Task) -> list[dict[str, object]]:
    """Compare the best row of ours with the best rival, at shares of the reference's traffic."""
    records = []
    for budget in BUDGETS:
        record: dict[str, object] = {"task": task.name, "traffic": f"{100 * budget:g} %"}
        scores: list[Series] = []
        held = f"ours less {task.family(task.reference.row)}, points"
        for title, rows in zip(("ours", "best rival"), task.sides(), strict=True):
            if (found := task.best_within(rows, budget)) is None:
                record |= {title: "all need more", f"{title}, metric": ""}
                continue
            record |= {title: found.name, f"{title}, metric": f"{found['value']:.3f}"}
            scores.append(task.entries[found.name].scores_after(found["round"]))
        has_ours = record["ours, metric"] != ""
        record["difference, points"] = difference(*scores) if len(scores) == 2 else ""
        record[held] = difference(scores[0], task.final) if has_ours else ""
        record["seeds"] = _seeds(*scores) if len(scores) == 2 else ""
        records.append(record)
    return records


def _seeds(one: Series, other: Series) -> str:
    """Count the seeds of one row, of another, and those of both, over which a difference is."""
    return f"{len(one)} / {len(other)} / {len(one.index.intersection(other.index))}"


def summary(task: Task) -> dict[str, object]:
    """Put both sides at one budget, and the traffic of each, in one row."""
    share, best = shares(task), winners(task)[BUDGETS.index(SUMMARY)]
    reference = f"{task.family(task.reference.row)}, float32"
    record: dict[str, object] = {
        "task": f"{task.name}, {share['metric']}",
        reference: f"{share[reference]}, {share['its MB']} MB",
    }
    for title, shown in (("ours", OURS), ("best rival", "best other method")):
        record[shown] = f"{best[f'{title}, metric']} ({best[title]})"
    record["difference, points"] = best["difference, points"]
    record["seeds: ours / other / both"] = best["seeds"]
    ways = " / ".join(f"{share[f'{title}, %']} %" for title in ("ours", "best rival"))
    return record | {"traffic to the metric of FedAvg-LoRA, ours / other": ways}


def draw_task(task: Task, path: Path) -> None:
    """Draw the rows of a task by family."""
    groups = {}
    for family in ORDER:
        curves = task.of(task.rows_of(family))
        rows = [_xy(curve) for _, curve in curves.groupby("run", sort=False)]
        groups[family] = rows, _xy(frontier(curves, higher=True))
    labels = "MB both ways, with catch-up, of all clients", task.reference.study.metric
    marks = [GOOD * task.whole / MEGABYTE]
    frontier_figure(groups, labels, path, marks=marks, level=task.target)


def _xy(rounds: DataFrame) -> list[tuple[float, float]]:
    return [*zip(rounds["traffic"] / MEGABYTE, rounds["value"], strict=True)]


def draw_shares(tasks: Sequence[Task], path: Path) -> None:
    """Draw by task how much traffic takes each family to the reference's final metric."""
    found: dict[str, dict[str, float]] = {family: {} for family in ORDER}
    for task in tasks:
        for family, shares_ in found.items():
            rows = [row for row in task.rows_of(family) if row != task.reference.row]
            if (best := task.leading(rows)) is not None:
                shares_[task.name] = best["traffic"] / task.whole
    held = " or ".join(dict.fromkeys(task.family(task.reference.row) for task in tasks))
    shares_figure(found, [task.name for task in tasks], f"{held} (float32)", path)


def has_run(studies: Iterable[str], results: Path = RESULTS) -> bool:
    """Tell whether all runs of some studies are there: its table is written at a study's end."""
    return all((results / folder / "table.md").is_file() for folder in studies)


def read_tasks(results: Path = RESULTS) -> list[Task]:
    """Read the tasks whose studies have all run."""
    tasks = SETUP["tasks"].items()
    return [
        Task.read(name, how, results) for name, how in tasks if has_run(how["studies"], results)
    ]


def write_frontier(tasks: Sequence[Task], out: Path) -> list[TextTable]:
    """Write the tables of all tasks, and return them."""
    tables = {
        "shares": TextTable.of([shares(task) for task in tasks]),
        "winners": TextTable.of([record for task in tasks for record in winners(task)]),
        "summary": TextTable.of([summary(task) for task in tasks]),
    }
    for name, table in tables.items():
        table.write(out, name)
    return [*tables.values()]


@reported
def main() -> int:
    """Write tables and figures of all tasks that have run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier")
    out = parser.parse_args().out
    tasks = read_tasks()
    if left := SETUP["tasks"].keys() - {task.name for task in tasks}:
        print(f"left out, since not all of their studies have run: {', '.join(sorted(left))}")
    out.mkdir(parents=True, exist_ok=True)
    for table in write_frontier(tasks, out):
        table.print()
    for task in tasks:
        draw_task(task, out / f"{task.name.lower().replace(' ', '_')}.png")
    draw_shares(tasks, out / "shares.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
