"""Compare runs: one table that ranks them and one figure, with the spread over seeds.

``python -m experiments.compare RUN [RUN ...] --out DIR --metric NAME --target X --by KEY[,KEY]``

RUN is the folder of a run or of a sweep. Runs that differ in nothing but seed and output folder
are one group. Groups are ranked by the metric; runs that diverged, or are unfinished, are named and
have no rank; broken ones are left out. With ``experiment=STUDY`` the runs are made first:
`experiments.study.ranking`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.groups import Group, group_runs, values
from experiments.interrupt import in_order
from experiments.reports import Run, find_runs, read_run
from experiments.status import reported
from experiments.study.ranking import compare_study, is_study
from experiments.tables import Table
from fedraclora.errors import CheckpointError, unknown
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.plots import MEGABYTE, compare_figure
from fedraclora.run.folder import resume_word
from fedraclora.run.ledger import number

__all__ = ["Table", "compare", "main"]

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
        ConfigError: If the metric or a key of ``by`` does not exist.
    """
    runs, notes = _read(paths)
    metric = _metric(runs, metric, notes)
    groups = group_runs(runs, by, notes)
    _warn(runs, groups, notes)
    groups, records = _ranked([(group, _record(group, metric, target)) for group in groups])
    columns = _columns(records, metric, target)
    cells = tuple(
        tuple(_cell(record, keys, len(group.runs)) for keys in columns.values())
        for record, group in zip(records, groups, strict=True)
    )
    table = Table(tuple(columns), cells, tuple(records), tuple(notes), texts=2)
    out.mkdir(parents=True, exist_ok=True)
    table.write(out, "table")
    ledgers = {group.title: [run.rows for run in group.runs] for group in groups}
    compare_figure(ledgers, metric, out / "compare.png")
    return table


def _read(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    runs, notes = [], []
    for folder in find_runs(paths):
        try:
            runs.append(read_run(folder))
        except CheckpointError as error:
            notes.append(f"left out: {error}")
    if not runs:
        raise CheckpointError("there is no run to compare\n" + "\n".join(notes))
    return runs, notes


def _metric(runs: Sequence[Run], asked: str | None, notes: list[str]) -> str:
    """Choose the metric, and say which runs do not have it or have lost it."""
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not known:
        raise CheckpointError("none of the runs was evaluated; there is no metric to compare")
    metric = asked or known[0]
    if metric not in known:
        raise unknown("metric", metric, known)
    for run in runs:
        if run.diverged_at is not None:
            advice = "it cannot go on as it is; lower local.lr or set local.clip"
            notes.append(f"warning: {run.folder}: diverged (round {run.diverged_at}), {advice}")
        elif run.unfinished:
            where = f"round {run.last} of {run.config.get('rounds')}"
            notes.append(f"{run.folder}: unfinished, {where}; go on with {resume_word(run.folder)}")
        elif not math.isfinite(run.final(metric)):
            notes.append(
                f"warning: {run.folder}: {metric} is absent or not finite at the last evaluated "
                "round"
            )
    return metric


def _ranked(
    found: Sequence[tuple[Group, dict[str, object]]],
) -> tuple[list[Group], list[dict[str, object]]]:
    """Sort groups, the best first, and number them; behind them what has no rank."""

    def place(pair: tuple[Group, dict[str, object]]) -> tuple[bool, bool, float]:
        group, record = pair
        sign = -1.0 if higher_is_better(str(record["metric"])) else 1.0
        mean = number(record, "metric_mean")
        known = math.isfinite(mean)
        return not known, group.unfinished, sign * mean if known else 0.0

    ordered = sorted(found, key=place)
    for rank, (group, record) in enumerate(ordered, 1):
        known = math.isfinite(number(record, "metric_mean"))
        if known and not group.unfinished:
            record["rank"] = rank
    return [group for group, _ in ordered], [record for _, record in ordered]


def _warn(runs: Sequence[Run], groups: Sequence[Group], notes: list[str]) -> None:
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


def _record(group: Group, metric: str, target: float | None) -> dict[str, object]:
    """The numbers of one group: means over its runs, and the deviation of the metric."""
    finals = [math.nan if run.diverged_at else run.final(metric) for run in group.runs]
    # One diverged seed makes the mean undefined: leaving it out would flatter the method.
    whole = all(math.isfinite(value) for value in finals)
    record: dict[str, object] = {
        "rank": math.nan,
        "label": group.label,
        "state": group.state,
        "seeds": len(group.seeds),
        "rounds": group.mean(lambda run: number(run.rows[-1], "round")),
        "metric": metric,
        "metric_mean": statistics.fmean(finals) if whole else math.nan,
        "metric_std": statistics.stdev(finals) if whole and len(finals) > 1 else math.nan,
        "uplink_mb_per_client_round": group.mean(_per_client_round),
        "uplink_mb": group.mean(lambda run: run.totals["uplink_bytes"] / MEGABYTE),
        "downlink_mb": group.mean(lambda run: run.totals["downlink_bytes"] / MEGABYTE),
        "uplink_floats": group.mean(lambda run: number(run.summary, "uplink_floats")),
    }
    if target is not None:
        reached = {id(run): _reach(run, metric, target) for run in group.runs}
        record["target_rounds"] = group.mean(lambda run: reached[id(run)][0])
        record["target_uplink_mb"] = group.mean(lambda run: reached[id(run)][1])
        record["target_virtual_seconds"] = group.mean(lambda run: reached[id(run)][2])
        record["target_reached"] = sum(math.isfinite(found[0]) for found in reached.values())
    record["aggregation_error_last"] = group.mean(lambda run: run.aggregation_error[0])
    record["aggregation_error_mean"] = group.mean(lambda run: run.aggregation_error[1])
    record["virtual_seconds"] = group.mean(lambda run: number(run.rows[-1], "virtual_seconds"))
    record["dropped_per_round"] = group.mean(lambda run: run.dropped_per_round)
    record["seconds"] = group.mean(lambda run: run.totals["seconds"])
    return record


def _per_client_round(run: Run) -> float:
    clients = run.totals["client_rounds"]
    return run.totals["uplink_bytes"] / MEGABYTE / clients if clients else math.nan


def _reach(run: Run, metric: str, target: float) -> tuple[float, float, float]:
    """Round, uplink (MB) and virtual seconds when the metric reached the target; NaN if never."""
    sign = 1.0 if higher_is_better(metric) else -1.0
    for row in run.evaluated:
        if sign * number(row, "metrics", metric) >= sign * target:
            megabytes = number(row, "uplink_total") / MEGABYTE
            return number(row, "round"), megabytes, number(row, "virtual_seconds")
    return math.nan, math.nan, math.nan


def _columns(
    records: Sequence[dict[str, object]], metric: str, target: float | None
) -> dict[str, tuple[str, ...]]:
    """Titles of the columns, and the keys of the record that each shows."""

    def measured(key: str) -> bool:
        return any(math.isfinite(number(record, key)) for record in records)

    columns: dict[str, tuple[str, ...]] = {
        "rank": ("rank",),
        "group": ("label",),
        f"{metric} (mean ± std)": ("metric_mean", "metric_std"),
        "seeds": ("seeds",),
        "rounds": ("rounds",),
        "MB up": ("uplink_mb",),
        "MB up per client and round": ("uplink_mb_per_client_round",),
        "MB down with catch-up": ("downlink_mb",),
        "floats up per client and round": ("uplink_floats",),
    }
    if target is not None:
        columns[f"rounds to {target:g}"] = ("target_rounds", "target_reached")
        columns[f"MB up to {target:g}"] = ("target_uplink_mb", "target_reached")
        if measured("virtual_seconds"):
            columns[f"virtual seconds to {target:g}"] = ("target_virtual_seconds", "target_reached")
    optional = {
        "aggregation error, last": "aggregation_error_last",
        "aggregation error, mean": "aggregation_error_mean",
        "virtual seconds": "virtual_seconds",
        "dropped per round": "dropped_per_round",
    }
    columns |= {title: (key,) for title, key in optional.items() if measured(key)}
    return columns | {"seconds": ("seconds",)}


def _cell(record: dict[str, object], keys: tuple[str, ...], runs: int) -> str:
    first = record[keys[0]]
    text = first if isinstance(first, str) else _format(number(record, keys[0]))
    second = number(record, keys[-1])
    if keys[-1] == "target_reached" and second < runs:
        return f"{text} ({second:g} of {runs} runs)" if second else "not reached"
    if keys[-1] == "metric_std" and not math.isfinite(number(record, keys[0])):
        return str(record["state"]) or text
    if keys[-1] == "metric_std" and math.isfinite(second):
        return f"{text} ± {second:.2g}"
    return text


def _format(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@reported
@in_order()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring.

    Args:
        argv: Arguments; None for those of the process.

    Returns:
        The exit status: 0, or 1 after an error that was printed.
    """
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
    words = sys.argv[1:] if argv is None else argv
    if is_study(words):
        compare_study(words)
        return 0
    chosen = parser.parse_args(words)
    by = [key.strip() for key in chosen.by.split(",") if key.strip()]
    table = compare(chosen.runs, chosen.out, chosen.metric, chosen.target, by)
    table.print()
    print(f"written: {chosen.out}/table.md, table.csv, compare.png")  # with every column
    return 0


if __name__ == "__main__":
    sys.exit(main())
