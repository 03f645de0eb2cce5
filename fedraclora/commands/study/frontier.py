"""The frontier of quality against bytes: rows of several studies of a task, put together.

    python -m fedraclora.commands.study.frontier [--out FOLDER]

``frontier.yaml`` names the tasks. Of each row the mean over its seeds is taken, round by round, of
the metric (beside the reference's on the same seeds) and of the bytes both ways with catch-up. The
reference is FedAvg-LoRA in float32; a share is what a row has sent where its mean first is as good
as the reference's at the end, over all that the reference sends. The best rows are chosen by what
is shown, on either side.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fedraclora.commands import RESULTS
from fedraclora.commands.status import reported
from fedraclora.commands.study.entries import Entry, entries, read_lines, score, traffic
from fedraclora.commands.study.file import SHARED, Study
from fedraclora.errors import ConfigError
from fedraclora.plots.axes import MEGABYTE
from fedraclora.plots.frontier import GOOD, frontier_figure, shares_figure
from fedraclora.run.ledger import number
from fedraclora.terminal.tables import Table
from fedraclora.tuning.frontier import Point, frontier, mean_curve
from fedraclora.weights.files import flatten

OURS = "Fed-RAC-LoRA"
FAMILIES = {
    "fed_rac_lora": OURS,
    "pool_rac_lora": OURS,
    "subspace_rac_lora": OURS,
    "fedavg_lora": "FedAvg-LoRA",
    "ffa_lora": "FFA-LoRA",
    "fedavg": "full FedAvg",
}
OTHER = "other rivals"
ORDER = (*dict.fromkeys(FAMILIES.values()), OTHER)  # so that a family has one colour everywhere
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the reference's traffic
FREE = "evaluate.every"  # of the groups that rows share: when they are measured


@dataclass(frozen=True)
class Curve:
    """A row of a study, and the mean of its runs.

    Attributes:
        entry: The row.
        points: The mean of its seeds at each measured round, but of the untrained model.
    """

    entry: Entry
    points: Sequence[Point]

    @classmethod
    def of(cls, entry: Entry) -> Curve:
        """Average the runs of a row."""
        metric = entry.study.metric
        runs = [
            [Point(int(number(p, "round")), traffic(p), score(p, metric)) for p in curve]
            for curve in entry.curves
        ]
        return cls(entry, [p for p in mean_curve(runs) if p.round])

    def beside(self, reference: Curve) -> Curve:
        """Add what the reference's end has on all of its seeds beyond that on this row's.

        So a row of fewer seeds is held against the same runs.

        Raises:
            ConfigError: If the two have no seed in common.
        """
        end = reference.scores_at(reference.points[-1].round)
        own = [end[seed] for seed in self.entry.seeds if seed in end]
        if not own:
            raise ConfigError(f"row {self.entry.row!r} has no seed of {reference.entry.row!r}")
        more = statistics.fmean(end.values()) - statistics.fmean(own)
        return replace(self, points=[replace(p, score=p.score + more) for p in self.points])

    @property
    def family(self) -> str:
        """Under whose colour it is drawn."""
        return FAMILIES.get(str(self.entry.lines[0]["config"]["method"]["name"]), OTHER)

    def at(self, budget: float) -> Point | None:
        """Give the last point within a budget of bytes."""
        return max(
            (p for p in self.points if p.bytes <= budget), key=lambda p: p.bytes, default=None
        )

    def scores_at(self, round_: int) -> dict[int, float]:
        """Give the metric after a round, by seed."""
        found = zip(self.entry.seeds, self.entry.curves, strict=True)
        metric = self.entry.study.metric
        return {
            seed: score(p, metric) for seed, curve in found for p in curve if p["round"] == round_
        }


@dataclass(frozen=True)
class Task:
    """The rows of a task.

    Attributes:
        name: Its name.
        curves: Of all rows whose runs are there and did not diverge, the reference among them.
        reference: The row that they are held against.
    """

    name: str
    curves: Sequence[Curve]
    reference: Curve

    @classmethod
    def read(cls, name: str, told: Mapping[str, Any], results: Path = RESULTS) -> Task:
        """Put the rows of some studies together.

        Raises:
            ConfigError: If two rows have one name, or differ in what a comparison shares, or the
                reference is not there.
        """
        curves: dict[str, Curve] = {}
        shared: dict[str, object] = {}
        for folder in told["studies"]:
            path = results / folder
            for entry in entries(Study.read(path / "study.yaml"), read_lines(path / "runs.jsonl")):
                if entry.row in curves:
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
                curves[entry.row] = Curve.of(entry)
        if told["reference"] not in curves:
            raise ConfigError(f"{name}: the runs of {told['reference']!r} are not there")
        reference = curves[told["reference"]]
        return cls(name, [curve.beside(reference) for curve in curves.values()], reference)

    @cached_property
    def whole(self) -> float:
        """Bytes that the reference sends in all."""
        return self.reference.points[-1].bytes

    @cached_property
    def target(self) -> float:
        """Its metric at the end."""
        return self.reference.points[-1].score

    def reached(self, curve: Curve) -> Point | None:
        """Find where a row first is as good as the reference at its end."""
        return next((p for p in curve.points if p.score >= self.target), None)

    def leading(self, curves: Iterable[Curve]) -> tuple[Curve, Point] | None:
        """Find the row that gets there in the fewest bytes."""
        found = [(curve, p) for curve in curves if (p := self.reached(curve)) is not None]
        return min(found, key=lambda pair: pair[1].bytes, default=None)

    def sides(self) -> tuple[list[Curve], list[Curve]]:
        """Part ours from the rivals, without the reference itself."""
        others = [c for c in self.curves if c.entry.row != self.reference.entry.row]
        ours = [curve for curve in others if curve.family == OURS]
        return ours, [curve for curve in others if curve.family != OURS]


def _alone(value: object) -> object:
    """Take a word out of a list of one, as older rows have it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _shared(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{k}." for k in SHARED)) and not key.startswith(FREE)


def difference(one: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Write the mean difference over seeds that both have, in points, with its standard error."""
    found = [100 * (one[seed] - other[seed]) for seed in one if seed in other]
    if not found:
        return "-"
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return f"{statistics.fmean(found):+.1f} ± {error:.1f}"


def shares(task: Task) -> dict[str, object]:
    """Say how little traffic takes ours, and the best rival, to the reference's final metric."""
    ours, rivals = map(task.leading, task.sides())
    record: dict[str, object] = {
        "task": task.name,
        "metric": task.reference.entry.study.metric,
        "FedAvg-LoRA, float32": f"{task.target:.3f}",
        "its MB": f"{task.whole / MEGABYTE:.4g}",
    }
    end = task.reference.scores_at(task.reference.points[-1].round)
    for title, found in (("ours", ours), ("best rival", rivals)):
        if found is None:
            record |= {title: "none gets there", f"{title}, %": "", f"{title}, points there": ""}
            continue
        curve, point = found
        record |= {
            title: curve.entry.row,
            f"{title}, %": f"{100 * point.bytes / task.whole:.2g}",
            f"{title}, points there": difference(curve.scores_at(point.round), end),
        }
    record["ours / rival"] = f"{ours[1].bytes / rivals[1].bytes:.2f}" if ours and rivals else ""
    return record


def winners(task: Task) -> list[dict[str, object]]:
    """Compare the best row of ours with the best rival, at shares of the reference's traffic."""
    records = []
    for budget in BUDGETS:
        record: dict[str, object] = {"task": task.name, "traffic": f"{100 * budget:g} %"}
        scores: list[Mapping[int, float]] = []
        for title, curves in zip(("ours", "best rival"), task.sides(), strict=True):
            found = [(c, p) for c in curves if (p := c.at(budget * task.whole)) is not None]
            if not found:
                record |= {title: "all need more", f"{title}, metric": ""}
                continue
            curve, point = max(found, key=lambda pair: pair[1].score)
            record |= {title: curve.entry.row, f"{title}, metric": f"{point.score:.3f}"}
            scores.append(curve.scores_at(point.round))
        record["difference, points"] = difference(*scores) if len(scores) == 2 else ""
        records.append(record)
    return records


def draw_task(task: Task, path: Path) -> None:
    """Draw the rows of a task by family."""
    groups = {}
    for family in ORDER:
        rows = [curve.points for curve in task.curves if curve.family == family]
        best = frontier([point for row in rows for point in row], higher=True)
        groups[family] = [_xy(row) for row in rows], _xy(best)
    metric = task.reference.entry.study.metric
    labels = "MB both ways, with catch-up, of all clients", metric
    marks = [GOOD * task.whole / MEGABYTE]
    frontier_figure(groups, labels, path, marks=marks, level=task.target)


def _xy(points: Iterable[Point]) -> list[tuple[float, float]]:
    return [(point.bytes / MEGABYTE, point.score) for point in points]


def draw_shares(tasks: Sequence[Task], path: Path) -> None:
    """Draw by task how much traffic takes each family to the reference's final metric."""
    found: dict[str, dict[str, float]] = {family: {} for family in ORDER}
    for task in tasks:
        for family, shares_ in found.items():
            rows = (c for side in task.sides() for c in side if c.family == family)
            if (best := task.leading(rows)) is not None:
                shares_[task.name] = best[1].bytes / task.whole
    shares_figure(found, [task.name for task in tasks], path)


def has_run(studies: Iterable[str], results: Path = RESULTS) -> bool:
    """Tell whether all runs of some studies are there: its table is written at a study's end."""
    return all((results / folder / "table.md").is_file() for folder in studies)


@reported
def main() -> int:
    """Write tables and figures of all tasks that have run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier")
    out = parser.parse_args().out
    told = yaml.safe_load(Path(__file__).with_name("frontier.yaml").read_text(encoding="utf-8"))
    whole = {name: how for name, how in told.items() if has_run(how["studies"])}
    tasks = [Task.read(name, how) for name, how in whole.items()]
    if left := [name for name in told if name not in whole]:
        print(f"left out, since not all of their studies have run: {', '.join(left)}")
    out.mkdir(parents=True, exist_ok=True)
    for name, records in (
        ("shares", [shares(task) for task in tasks]),
        ("winners", [record for task in tasks for record in winners(task)]),
    ):
        table = Table.of(records)
        table.write(out, name)
        table.print()
    for task in tasks:
        draw_task(task, out / f"{task.name.lower().replace(' ', '_')}.png")
    draw_shares(tasks, out / "shares.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
