"""Compare groups of runs in a table that ranks them and a figure.

Runs that differ only in seed and output folder are one group. Groups are ranked by the metric; runs
that diverged or are unfinished are listed without a rank, and damaged ones are left out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedraclora.commands.run_files import (
    ABSENT,
    BEGINS,
    ROUNDING_ERRORS,
    Group,
    RunFiles,
    differing,
    find_runs,
    group_runs,
    is_result,
    read_files,
    refuse_overwriting,
    values,
)
from fedraclora.commands.study.entries import UNTRAINED, is_exact, of_all, shown_error
from fedraclora.errors import CheckpointError, ConfigError, FedRacLoraError, unknown
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.plots.axes import MEGABYTE
from fedraclora.plots.comparison import POSITIONS, compare_figure
from fedraclora.protocol.uplinks import calmer
from fedraclora.run.folder import resume_word
from fedraclora.run.ledger import number
from fedraclora.run.statistics import (
    Spread,
    first_reaching,
    last,
    last_within,
    mean_curve,
    paired,
    rounds_of,
)
from fedraclora.run.stopped import stop_reason
from fedraclora.run.trusted import refuse_linked
from fedraclora.terminal.tables import TextTable
from fedraclora.wire.fields import printable

if TYPE_CHECKING:
    from pandas import DataFrame, Series

Ranked = tuple[Group, dict[str, object]]  # a group, and its numbers
SHOWN = 8  # most variants of an opening fact that are listed
FILES = ("table.md", "table.csv", "compare.png")
SETTINGS = {  # title -> key of the settings that each row shows
    "rank": "method.rank",
    "precision up": "compression.uplink",
    "precision down": "compression.downlink",
    "learning rate": "local.lr",
}
_TASK = ("data.", "model.", "pretrain.")


def compare_runs(
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
        target: A value of the metric; adds columns with the rounds and bytes to reach it.
        by: Config keys to group runs by, besides the method, instead of all that differ.

    Returns:
        The table, the best group first; its notes name the runs that were left out, and why.

    Raises:
        CheckpointError: If no path has a run with rounds.
        ConfigError: If the metric or a key of ``by`` does not exist, the target is not finite, or
            ``out`` has other files of these names.
    """
    if target is not None and not math.isfinite(target):
        raise ConfigError(f"--target={target}: give a value of the metric")
    refuse_others(out)
    runs, notes = _read(paths)
    metric = _metric(runs, metric, notes)
    groups = group_runs(runs, by, notes)
    _warn(runs, groups, notes)
    notes += _begun(groups)
    rounds = rounds_of({run.folder: run.rows for run in runs}, [metric])
    wanted = ComparisonMetric.of(groups, rounds, metric, target)
    ranked = _ranked(groups, rounds, wanted)
    records = tuple(record for _, record in ranked)
    measured = {key for r in records for key in r if math.isfinite(number(r, key))}
    shown = [_shown(record, len(group.runs), wanted, measured) for group, record in ranked]
    table = replace(TextTable.of(shown, notes), records=records, texts=2)
    out.mkdir(parents=True, exist_ok=True)
    table.write(out, "table")
    draw([group for group, _ in ranked], rounds, metric, out)
    return table


def compare_rows(
    groups: Sequence[Group], reference: str, out: Path, metric: str | None = None
) -> TextTable:
    """Compare groups of runs with a reference by seed; write the same three files.

    Args:
        groups: Groups with the same seeds; each run has rounds.
        reference: Name of the group to compare the others with, by paired differences and by the
            rounds and bytes to reach its final metric.
        out: Folder of the files.
        metric: Key of the ledger's metrics; None for the first metric of the first run.

    Returns:
        The table, the best group first.

    Raises:
        ConfigError: If there is no such metric.
    """
    runs, notes = [run for group in groups for run in group.runs], list[str]()
    metric = _metric(runs, metric, notes)
    rounds = rounds_of({run.folder: run.rows for run in runs}, [metric])
    (base,) = (group for group in groups if group.name == reference)
    wanted = ComparisonMetric.of(groups, rounds, metric, finals_of(base, metric).mean)
    ranked = _ranked(groups, rounds, wanted)
    records = tuple(
        record | settings_of(group) | _difference(group, base, metric) for group, record in ranked
    )
    shown = [
        _against(record, len(group.runs), wanted, reference)
        for (group, _), record in zip(ranked, records, strict=True)
    ]
    if keys := differing(runs):
        notes.append(f"The rows differ in method, {', '.join(keys)}; all else is the same.")
    table = replace(TextTable.of(shown, notes), records=records)
    out.mkdir(parents=True, exist_ok=True)
    table.write(out, "table")
    draw([group for group, _ in ranked], rounds, metric, out, against=("round", "traffic"))
    return table


def refuse_others(out: Path) -> None:
    """Check that `FILES` would not overwrite files that a comparison or study did not write.

    Raises:
        ConfigError: If one of them exists.
    """
    refuse_linked(out)
    if not is_result(out):
        refuse_overwriting(out, FILES)


def draw(
    groups: Sequence[Group],
    rounds: DataFrame,
    metric: str,
    out: Path,
    against: Collection[str] = POSITIONS,
) -> None:
    """Draw the mean curve of each group, in the color of its method, as ``compare.png``."""
    curves = {printable(g.title): mean_curve(_of_group(rounds, g), g.title) for g in groups}
    methods = {printable(group.title): group.method for group in groups}
    compare_figure(curves, metric, out / "compare.png", methods=methods, against=against)


@dataclass(frozen=True)
class ComparisonMetric:
    """The metric, target and budget of a comparison.

    Attributes:
        metric: Key of the ledger's metrics.
        target: A value of the metric to reach, or None.
        budget: Bytes both ways at which runs are also compared: those of the cheapest run.
        higher: Whether higher values are better.
    """

    metric: str
    target: float | None
    budget: float
    higher: bool = True

    @classmethod
    def of(
        cls, groups: Sequence[Group], rounds: DataFrame, metric: str, target: float | None
    ) -> ComparisonMetric:
        """Derive the budget and the metric's direction from the runs."""
        runs = [run for group in groups for run in group.runs]
        whole = [run for run in runs if run.summary and run.diverged_at is None] or runs
        higher = higher_is_better(metric, [name for run in runs for name in run.lower])
        budget = last(rounds)["traffic"][[run.folder for run in whole]].min()
        return cls(metric, target, float(budget), higher)


def _read(paths: Sequence[Path]) -> tuple[list[RunFiles], list[str]]:
    runs, notes = [], []
    folders, without = find_runs(paths)
    if without:  # printed, not a note of the table: a pattern may match the table's own folder
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


def _metric(runs: Sequence[RunFiles], chosen: str | None, notes: list[str]) -> str:
    """Choose the metric; note which runs have no final value of it."""
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not known:
        raise CheckpointError("none of the runs was evaluated; there is no metric to compare")
    metric = chosen or known[0]
    if metric not in known:
        raise unknown("metric", metric, known)
    for run in runs:
        if run.diverged_at is not None:
            own_code = run.keys.get("local.train") is not None
            advice = f"it cannot be resumed as it is; {calmer(own=own_code)}"
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


def _ranked(groups: Sequence[Group], rounds: DataFrame, wanted: ComparisonMetric) -> list[Ranked]:
    """Sort and number the groups, the best first; those without a rank come last."""
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
    """Note what makes the comparison unfair."""
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
    """Describe what the runs train and how: once if it is the same for all runs."""
    for title in BEGINS:
        found: dict[str, str] = {}
        for group in groups:
            for run in group.runs:
                if title in run.begins:
                    found.setdefault(run.begins[title], group.label)
        texts = [text if len(found) == 1 else f"{label}: {text}" for text, label in found.items()]
        if texts:
            yield f"{title}: {'; '.join(texts[:SHOWN])}" + ("; ..." if texts[SHOWN:] else "")


def _record(group: Group, rounds: DataFrame, wanted: ComparisonMetric) -> dict[str, object]:
    """Compute the numbers of one group: means over its runs, and the metric's deviation.

    Args:
        group: The runs.
        rounds: Their rounds (`statistics.rounds_of`).
        wanted: Metric, target and budget.
    """
    final = finals_of(group, wanted.metric)
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
        "metric_error": final.error,
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


def finals_of(group: Group, metric: str) -> Spread:
    """Average the final metric; NaN if a run diverged, since leaving it out favors its method."""
    return Spread.of(_by_seed(group, metric))


def _by_seed(group: Group, metric: str) -> Series:
    from pandas import Series

    found = {
        str(run.seed): math.nan if run.diverged_at is not None else run.final(metric)
        for run in group.runs
    }
    return Series(found, dtype=float)


def _difference(group: Group, base: Group, metric: str) -> dict[str, object]:
    """Compute the mean difference of runs of the same seeds, and its standard error."""
    found = paired(_by_seed(group, metric), _by_seed(base, metric))
    return {"difference": found.mean, "difference_error": found.error}


def settings_of(group: Group) -> dict[str, object]:
    """Return the values of `SETTINGS` of a group as text; "-" if it has none."""
    each = {title: values(group.runs, key) for title, key in SETTINGS.items()}
    found: dict[str, object] = {
        title: "-" if texts == [ABSENT] else ", ".join(texts) for title, texts in each.items()
    }
    if any(run.keys.get("local.train") is not None for run in group.runs):  # its rates, times this
        found["learning rate"] = f"times {found['learning rate']}"
    if found["rank"] == "-":  # the config does not describe a method that a program passed
        ranks = {rank for run in group.runs for rank in _trained_ranks(run)}
        found["rank"] = " to ".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "-"
    return found


def _trained_ranks(run: RunFiles) -> list[int]:
    """Return the trained ranks that a run recorded; empty if it is unfinished or has none."""
    found: Any = run.summary
    for key in ("begins", "trained", "ranks"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, list) else []


def _is_exact(run: RunFiles) -> bool:
    """Check whether the aggregation was exact; False if this version has no such method."""
    try:
        return is_exact(run.config)
    except FedRacLoraError:
        return False


def _shown(
    record: dict[str, object], runs: int, wanted: ComparisonMetric, measured: Collection[str]
) -> dict[str, str]:
    """Return the cells of a record, by column title.

    Args:
        record: From `_record`.
        runs: Number of the group's runs.
        wanted: Metric, target and budget.
        measured: Keys for which some record has a number; optional columns need one.
    """
    text = partial(shown_number, record)
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
        reached_runs = record["target_reached"]
        missed = of_all(reached_runs, runs)
        keys = {
            "rounds": "rounds",
            "MB up": "uplink_mb",
            "MB both ways": "traffic_mb",
            "virtual seconds": "virtual_seconds",
        }
        for title, key in keys.items():
            if key in measured:
                reached = text(f"target_{key}") + missed if reached_runs else "not reached"
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


def shown_number(record: Mapping[str, object], key: str) -> str:
    """Format a number of a record for a table."""
    value = number(record, key)
    if not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _against(
    record: dict[str, object], runs: int, wanted: ComparisonMetric, reference: str
) -> dict[str, str]:
    """Return the cells of a record that is compared with a reference, by column title.

    Args:
        record: From `_record`, with its settings and the difference to the reference.
        runs: Number of the group's runs.
        wanted: Metric, target and budget.
        reference: The label of the reference.
    """
    text = partial(shown_number, record)

    def spread(key: str, error: str, sign: str = "", lost: str = "-") -> str:
        mean, around = number(record, key), number(record, error)
        if not math.isfinite(mean):
            return lost
        return f"{mean:{sign}.4f}" + (f" ± {around:.2g}" if math.isfinite(around) else "")

    reached_runs = record.get("target_reached", 0)
    own = record["label"] == reference
    shown = {
        "method": str(record["label"]),
        **{title: str(record[title]) for title in SETTINGS},
        f"{wanted.metric}, ± standard error": spread(
            "metric_mean", "metric_error", lost=str(record["state"]) or "-"
        ),
        f"less {reference}, paired": "" if own else spread("difference", "difference_error", "+"),
        "MB up": text("uplink_mb"),
        "MB down": text("downlink_mb"),
    }
    if wanted.target is not None and math.isfinite(wanted.target):
        missed = of_all(reached_runs, runs)
        for title, key in {"rounds": "target_rounds", "MB": "target_traffic_mb"}.items():
            reached = text(key) + missed if reached_runs else "not reached"
            shown[f"{title} to {wanted.target:.4f}"] = reached
    return shown | {"seconds": text("round_seconds"), "seeds": text("seeds")}
