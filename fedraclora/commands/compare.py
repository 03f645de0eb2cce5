"""Compare runs: one table that ranks them and one figure, with the spread over seeds.

``fedraclora compare RUN [RUN ...] --out DIR --metric NAME --target X --by KEY[,KEY]``

RUN is the folder of a run or of a sweep. Runs that differ in nothing but seed and output folder
are one group. Groups are ranked by the metric; runs that diverged, or are unfinished, are named and
have no rank; broken ones are left out. With ``experiment=STUDY`` the runs are made first:
`fedraclora.commands.study.leaderboard`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedraclora.commands.run_files import (
    BEGINS,
    ROUNDING_ERRORS,
    Group,
    RunFiles,
    find_runs,
    group_runs,
    is_result,
    read_files,
    refuse_overwriting,
    values,
)
from fedraclora.commands.study.entries import UNTRAINED, is_exact, of_all, shown_error
from fedraclora.commands.study.leaderboard import compare_study, is_study
from fedraclora.errors import CheckpointError, ConfigError, FedRacLoraError, unknown
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.plots.axes import MEGABYTE
from fedraclora.plots.comparison import compare_figure
from fedraclora.protocol.uplinks import calmer
from fedraclora.run.folder import resume_word
from fedraclora.run.ledger import number
from fedraclora.run.statistics import (
    Spread,
    first_reaching,
    last,
    last_within,
    mean_curve,
    rounds_of,
)
from fedraclora.run.stopped import stop_reason
from fedraclora.run.trusted import refuse_linked
from fedraclora.terminal.tables import TextTable
from fedraclora.wire.fields import printable

if TYPE_CHECKING:
    from pandas import DataFrame

Ranked = tuple[Group, dict[str, object]]  # a group, and its numbers
SHOWN = 8  # ways to begin that are told apart
_TASK = ("data.", "model.", "pretrain.")


def compare(
    paths: Sequence[Path],
    out: Path,
    metric: str | None = None,
    target: float | None = None,
    by: Sequence[str] = (),
) -> TextTable:
    """Compare runs and write ``table.md``, ``table.csv`` and ``compare.png``.

    Args:
        paths: Folders of runs or sweeps.
        out: Folder of the three files.
        metric: Key of the ledger's metrics; None for the first metric of the first run.
        target: Value of the metric to be reached; adds the rounds and uplink that it took.
        by: Config keys that part the groups besides the method, instead of all that differ.

    Returns:
        The table, the best group first; its notes name the runs that were left out, and why.

    Raises:
        CheckpointError: If no path has a run with rounds.
        ConfigError: If the metric or a key of ``by`` does not exist, the target is no number, or
            ``out`` holds somebody else's files.
    """
    if target is not None and not math.isfinite(target):
        raise ConfigError(f"--target={target}: give a value of the metric")
    refuse_linked(out)
    if not is_result(out):
        refuse_overwriting(out, ("table.md", "table.csv", "compare.png"))
    runs, notes = _read(paths)
    metric = _metric(runs, metric, notes)
    groups = group_runs(runs, by, notes)
    _warn(runs, groups, notes)
    notes += _begun(groups)
    whole = [run for run in runs if run.summary and run.diverged_at is None] or runs
    higher = higher_is_better(metric, [name for run in runs for name in run.lower])
    rounds = rounds_of({run.folder: run.rows for run in runs}, [metric])
    budget = last(rounds)["traffic"][[run.folder for run in whole]].min()
    wanted = Wanted(metric, target, float(budget), higher)
    ranked = _ranked(groups, rounds, wanted)
    records = tuple(record for _, record in ranked)
    measured = {key for r in records for key in r if math.isfinite(number(r, key))}
    shown = [_shown(record, len(group.runs), wanted, measured) for group, record in ranked]
    table = replace(TextTable.of(shown, notes), records=records, texts=2)
    out.mkdir(parents=True, exist_ok=True)
    table.write(out, "table")
    curves = {printable(g.title): mean_curve(_of_group(rounds, g), g.title) for g, _ in ranked}
    methods = {printable(group.title): group.method for group in groups}
    compare_figure(curves, metric, out / "compare.png", methods=methods)
    return table


@dataclass(frozen=True)
class Wanted:
    """What runs are compared in.

    Attributes:
        metric: Key of the ledger's metrics.
        target: A value of it to be reached, or None.
        budget: Bytes both ways at which they are compared, too: of the run that took least.
        higher: Whether more of the metric is better.
    """

    metric: str
    target: float | None
    budget: float
    higher: bool = True


def _read(paths: Sequence[Path]) -> tuple[list[RunFiles], list[str]]:
    runs, notes = [], []
    folders, without = find_runs(paths)
    if without:  # no note: a table says the same, whether its own folder was named or not
        named = printable(", ".join(map(str, without)))
        print(f"skipped, since it contains no run: {named}")
    for folder in folders:
        try:
            runs.append(read_files(folder))
        except CheckpointError as error:
            notes.append(f"left out: {error}")
    if not runs:
        raise CheckpointError("there is no run to compare\n" + "\n".join(notes))
    return runs, notes


def _metric(runs: Sequence[RunFiles], asked: str | None, notes: list[str]) -> str:
    """Choose the metric, and say which runs do not have it or have lost it."""
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not known:
        raise CheckpointError("none of the runs was evaluated; there is no metric to compare")
    metric = asked or known[0]
    if metric not in known:
        raise unknown("metric", metric, known)
    for run in runs:
        if run.diverged_at is not None:
            own = run.keys.get("local.train") is not None
            advice = f"it cannot be resumed as it is; {calmer(own=own)}"
            notes.append(f"warning: {run.folder}: diverged (round {run.diverged_at}), {advice}")
        elif run.unfinished:
            where = f"round {run.last} of {run.config.get('rounds')}"
            why = f" ({reason})" if (reason := stop_reason(run.folder)) else ""
            again = f"resume it with {resume_word(run.folder)}"
            notes.append(f"{run.folder}: unfinished, {where}{why}; {again}")
        elif not math.isfinite(run.final(metric)):
            notes.append(
                f"warning: {run.folder}: {metric} is absent or not finite at the last evaluated "
                "round"
            )
    return metric


def _of_group(rounds: DataFrame, group: Group) -> DataFrame:
    return rounds[rounds["run"].isin([run.folder for run in group.runs])]


def _ranked(groups: Sequence[Group], rounds: DataFrame, wanted: Wanted) -> list[Ranked]:
    """Sort groups, the best first, and number them; behind them what has no rank."""
    sign = -1.0 if wanted.higher else 1.0

    def place(ranked: Ranked) -> tuple[bool, bool, float]:
        mean = sign * number(ranked[1], "metric_mean")
        lost = not math.isfinite(mean)
        return lost, ranked[0].unfinished, 0.0 if lost else mean

    records = (_record(group, _of_group(rounds, group), wanted) for group in groups)
    found = sorted(zip(groups, records, strict=True), key=place)
    for rank, (group, record) in enumerate(found, 1):
        if math.isfinite(number(record, "metric_mean")) and not group.unfinished:
            record["rank"] = rank
    return found


def _warn(runs: Sequence[RunFiles], groups: Sequence[Group], notes: list[str]) -> None:
    """Add what makes a comparison unfair."""
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    task = [k for k in keys if k.startswith(_TASK) and len(values(runs, k)) > 1]
    if task:
        shown = "; ".join(f"{key}: {', '.join(values(runs, key))}" for key in task)
        notes.append(f"warning: the runs have different tasks ({shown})")
    notes += [
        f"warning: {group.label}: {len(group.runs)} runs but {len(group.seeds)} different seeds "
        f"({', '.join(str(run.folder) for run in group.runs)}); the spread is not that of seeds"
        for group in groups
        if len(group.seeds) < len(group.runs)
    ]


def _begun(groups: Sequence[Group]) -> Iterator[str]:
    """Say what the runs learn, and how: once, where that is the same of all of them."""
    for title in BEGINS:
        found: dict[str, str] = {}
        for group in groups:
            for run in group.runs:
                if title in run.begins:
                    found.setdefault(run.begins[title], group.label)
        texts = [text if len(found) == 1 else f"{label}: {text}" for text, label in found.items()]
        if texts:
            yield f"{title}: {'; '.join(texts[:SHOWN])}" + ("; ..." if texts[SHOWN:] else "")


def _record(group: Group, rounds: DataFrame, wanted: Wanted) -> dict[str, object]:
    """The numbers of one group: means over its runs, and the deviation of the metric.

    Args:
        group: The runs.
        rounds: Of the runs (`statistics.rounds_of`).
        wanted: What is compared.
    """
    # A diverged seed makes the mean undefined: leaving it out would favour the method.
    final = Spread.of(
        math.nan if run.diverged_at is not None else run.final(wanted.metric) for run in group.runs
    )
    ends, by_run = last(rounds), rounds.groupby("run", sort=False)
    within = last_within(rounds, wanted.budget)

    def mean(figures: Iterable[float]) -> float:
        return Spread.of_known(figures).mean

    record: dict[str, object] = {
        "rank": math.nan,
        "label": group.label,
        "state": group.state,
        "seeds": len(group.seeds),
        "rounds": mean(ends["round"]),
        "metric": wanted.metric,
        "metric_mean": final.mean if math.isfinite(final.mean) else math.nan,
        "metric_std": final.deviation,
        "exact": _is_exact(group.runs[0]),
    }
    for way in ("uplink", "downlink"):
        each = ends[way] / by_run["cohort"].sum()
        record[f"{way}_mb_per_client_round"] = mean(each / MEGABYTE)
    for way in ("uplink", "downlink", "traffic"):
        record[f"{way}_mb"] = mean(ends[way] / MEGABYTE)
    record |= {
        "metric_at_traffic": mean(within["value"]),
        "within_traffic": len(within),
        "uplink_floats": mean(number(run.summary, "uplink_floats") for run in group.runs),
    }
    if wanted.target is not None:
        reached = first_reaching(rounds, wanted.target, higher=wanted.higher)
        record |= {
            "target_rounds": mean(reached["round"]),
            "target_uplink_mb": mean(reached["uplink"] / MEGABYTE),
            "target_traffic_mb": mean(reached["traffic"] / MEGABYTE),
            "target_virtual_seconds": mean(reached["virtual_seconds"]),
            "target_reached": len(reached),
        }
    return record | {
        "aggregation_error_last": mean(by_run["aggregation_error"].last()),
        "aggregation_error_mean": mean(by_run["aggregation_error"].mean()),
        **{key: mean(by_run[key].mean()) for key in ROUNDING_ERRORS.values()},
        "virtual_seconds": mean(ends["virtual_seconds"]),
        "dropped_per_round": mean(by_run["dropped"].mean()),
        "round_seconds": mean(ends["seconds"]),
    }


def _is_exact(run: RunFiles) -> bool:
    """Check whether aggregates were means; False where the method is none of this version's."""
    try:
        return is_exact(run.config)
    except FedRacLoraError:
        return False


def _shown(
    record: dict[str, object], runs: int, wanted: Wanted, measured: Collection[str]
) -> dict[str, str]:
    """What the table shows of a record, by title.

    Args:
        record: Of `_record`.
        runs: Of the group.
        wanted: What is compared.
        measured: Keys that some record has a number of; the others have no column, if they may
            be absent.
    """

    def text(key: str) -> str:
        value = number(record, key)
        if not math.isfinite(value):
            return "-"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    mean, spread = text("metric_mean"), number(record, "metric_std")
    if not math.isfinite(number(record, "metric_mean")):
        mean = str(record["state"]) or mean
    elif math.isfinite(spread):
        mean = f"{mean} ± {spread:.2g}"
    shown = {
        "rank": text("rank"),
        "group": str(record["label"]),
        f"{record['metric']} (mean ± std)": mean,
    }
    if (target := wanted.target) is not None:
        there = record["target_reached"]
        missed = of_all(there, runs)
        keys = {
            "rounds": "rounds",
            "MB up": "uplink_mb",
            "MB both ways": "traffic_mb",
            "virtual seconds": "virtual_seconds",
        }
        for title, key in keys.items():
            if key in measured:
                reached = text(f"target_{key}") + missed if there else "not reached"
                shown[f"{title} to {target:g}"] = reached
    shown |= {
        "seeds": text("seeds"),
        "rounds": text("rounds"),
        "MB up": text("uplink_mb"),
        "MB up per client and round": text("uplink_mb_per_client_round"),
        "MB down with catch-up": text("downlink_mb"),
        "MB both ways": text("traffic_mb"),
        "floats up per client and round": text("uplink_floats"),
        "MB down per client and round": text("downlink_mb_per_client_round"),
    }
    within = int(number(record, "within_traffic"))
    at_budget = text("metric_at_traffic") + of_all(within, runs) if within else UNTRAINED
    shown[f"{wanted.metric} at {wanted.budget / MEGABYTE:.4g} MB both ways"] = at_budget
    for over in ("last", "mean"):
        if (key := f"aggregation_error_{over}") in measured:
            error = shown_error(bool(record["exact"]), number(record, key))
            shown[f"aggregation error, {over}"] = error
    optional = {
        **ROUNDING_ERRORS,
        "virtual seconds": "virtual_seconds",
        "dropped per round": "dropped_per_round",
    }
    shown |= {title: text(key) for title, key in optional.items() if key in measured}
    return shown | {"seconds of rounds": text("round_seconds")}


def main(words: Sequence[str]) -> None:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="fedraclora compare",
        description="Compare and rank runs: table.md, table.csv, compare.png.",
        epilog="Or experiment=STUDY [KEY=VALUE ...]: run methods alike first, and rank them.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run or sweep folder")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="output folder")
    parser.add_argument("--metric", help="metric to compare (the runs' first one)")
    parser.add_argument("--target", type=float, help="value of the metric to be reached")
    parser.add_argument("--by", default="", metavar="KEY[,KEY]", help="config keys to group by")
    if is_study(words):
        compare_study(words)
        return
    chosen = parser.parse_args(words)
    by = [key.strip() for key in chosen.by.split(",") if key.strip()]
    table = compare(chosen.runs, chosen.out, chosen.metric, chosen.target, by)
    table.print()
    print(f"written: {chosen.out}/table.md, table.csv, compare.png")  # with every column
