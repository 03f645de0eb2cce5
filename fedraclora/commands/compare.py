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
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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
from fedraclora.commands.study.entries import (
    UNTRAINED,
    is_exact,
    mean_of_known,
    of_all,
    shown_error,
    traffic,
)
from fedraclora.commands.study.leaderboard import compare_study, is_study
from fedraclora.errors import CheckpointError, ConfigError, FedRacLoraError, unknown
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.plots.axes import MEGABYTE
from fedraclora.plots.comparison import compare_figure
from fedraclora.protocol.uplinks import calmer
from fedraclora.run.folder import resume_word
from fedraclora.run.ledger import column, known_mean, number, round_seconds
from fedraclora.run.stopped import stop_reason
from fedraclora.run.trusted import refuse_linked
from fedraclora.terminal.tables import Table
from fedraclora.wire.fields import printable

Ranked = tuple[Group, dict[str, object]]  # a group, and its numbers
SHOWN = 8  # ways to begin that are told apart
_TASK = ("data.", "model.", "pretrain.")


def compare(
    paths: Sequence[Path],
    out: Path,
    metric: str | None = None,
    target: float | None = None,
    by: Sequence[str] = (),
) -> Table:
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
        raise ConfigError(f"--target is {target}; a value of the metric is wanted")
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
    wanted = Wanted(metric, target, min(traffic(run.rows[-1]) for run in whole), higher)
    ranked = _ranked(groups, wanted)
    records = tuple(record for _, record in ranked)
    measured = {key for r in records for key in r if math.isfinite(number(r, key))}
    shown = [_shown(record, len(group.runs), wanted, measured) for group, record in ranked]
    table = replace(Table.of(shown, notes), records=records, texts=2)
    out.mkdir(parents=True, exist_ok=True)
    table.write(out, "table")
    ledgers = {printable(group.title): [run.rows for run in group.runs] for group, _ in ranked}
    compare_figure(ledgers, metric, out / "compare.png")
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
        print(f"passed over, as there is no run in it: {named}")
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
            advice = f"it cannot go on as it is; {calmer(own=own)}"
            notes.append(f"warning: {run.folder}: diverged (round {run.diverged_at}), {advice}")
        elif run.unfinished:
            where = f"round {run.last} of {run.config.get('rounds')}"
            why = f" ({reason})" if (reason := stop_reason(run.folder)) else ""
            again = f"go on with {resume_word(run.folder)}"
            notes.append(f"{run.folder}: unfinished, {where}{why}; {again}")
        elif not math.isfinite(run.final(metric)):
            notes.append(
                f"warning: {run.folder}: {metric} is absent or not finite at the last evaluated "
                "round"
            )
    return metric


def _ranked(groups: Sequence[Group], wanted: Wanted) -> list[Ranked]:
    """Sort groups, the best first, and number them; behind them what has no rank."""
    sign = -1.0 if wanted.higher else 1.0

    def place(ranked: Ranked) -> tuple[bool, bool, float]:
        mean = sign * number(ranked[1], "metric_mean")
        lost = not math.isfinite(mean)
        return lost, ranked[0].unfinished, 0.0 if lost else mean

    found = sorted(((group, _record(group, wanted)) for group in groups), key=place)
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
        notes.append(f"warning: the runs are of different tasks ({shown})")
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


def _record(group: Group, wanted: Wanted) -> dict[str, object]:
    """The numbers of one group: means over its runs, and the deviation of the metric."""
    metric = wanted.metric
    finals = [math.nan if run.diverged_at else run.final(metric) for run in group.runs]
    # One diverged seed makes the mean undefined: leaving it out would flatter the method.
    whole = all(math.isfinite(value) for value in finals)
    found = [_figures(run, wanted) for run in group.runs]
    means = {key: mean_of_known(figures[key] for figures in found) for key in found[0]}
    means["within_traffic"] = sum(figures["within_traffic"] for figures in found)
    record: dict[str, object] = {
        "rank": math.nan,
        "label": group.label,
        "state": group.state,
        "seeds": len(group.seeds),
        "rounds": means.pop("rounds"),
        "metric": metric,
        "metric_mean": statistics.fmean(finals) if whole else math.nan,
        "metric_std": statistics.stdev(finals) if whole and len(finals) > 1 else math.nan,
        "exact": _is_exact(group.runs[0]),
        **means,
    }
    if wanted.target is not None:
        record["target_reached"] = int(sum(figures["target_reached"] for figures in found))
    return record


def _is_exact(run: RunFiles) -> bool:
    """Check whether aggregates were means; False where the method is none of this version's."""
    try:
        return is_exact(run.config)
    except FedRacLoraError:
        return False


def _figures(run: RunFiles, wanted: Wanted) -> dict[str, float]:
    """The numbers of one run; NaN where it has none."""
    metric, target = wanted.metric, wanted.target
    # Of the weights before round 1 nobody has learnt anything yet.
    trained = [row for row in run.rows_of(metric) if number(row, "round") > 0]
    within = [row for row in trained if traffic(row) <= wanted.budget]
    last, clients = run.rows[-1], np.nansum(column(run.rows, "cohort"))
    sent, fetched = (number(last, f"{way}_total") / MEGABYTE for way in ("uplink", "downlink"))
    errors = column(run.rows, "report", "aggregation_error")
    errors = errors[np.isfinite(errors)]
    # What simulated devices lost; without devices there are none.
    dropped = [float(len(row["dropped"])) for row in run.rows if "dropped" in row]
    figures = {
        "rounds": number(last, "round"),
        "uplink_mb_per_client_round": float(sent / clients) if clients else math.nan,
        "downlink_mb_per_client_round": float(fetched / clients) if clients else math.nan,
        "uplink_mb": sent,
        "downlink_mb": fetched,
        "traffic_mb": sent + fetched,
        "metric_at_traffic": number(within[-1] if within else {}, "metrics", metric),
        "within_traffic": float(bool(within)),
        "uplink_floats": number(run.summary, "uplink_floats"),
    }
    if target is not None:
        sign = 1.0 if wanted.higher else -1.0
        rows = run.rows_of(metric)
        reached = (r for r in rows if sign * number(r, "metrics", metric) >= sign * target)
        row = next(reached, {})
        figures["target_rounds"] = number(row, "round")
        figures["target_uplink_mb"] = number(row, "uplink_total") / MEGABYTE
        figures["target_traffic_mb"] = traffic(row) / MEGABYTE
        figures["target_virtual_seconds"] = number(row, "virtual_seconds")
        figures["target_reached"] = float(bool(row))
    return figures | {
        "aggregation_error_last": float(errors[-1]) if errors.size else math.nan,
        "aggregation_error_mean": known_mean(run.rows, "report", "aggregation_error"),
        **{key: known_mean(run.rows, key) for key in ROUNDING_ERRORS.values()},
        "virtual_seconds": number(last, "virtual_seconds"),
        "dropped_per_round": mean_of_known(dropped),
        "round_seconds": math.fsum(round_seconds(row) for row in run.rows),
    }


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
