"""Tables and figures of a study, always from the lines of its runs.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedraclora.commands.run_files import ROUNDING_ERRORS
from fedraclora.commands.study.entries import (
    DEVIATION,
    UNTRAINED,
    Done,
    Entry,
    diverged,
    finals,
    first_reaching,
    mean_and_deviation,
    notes_of,
    of_runs,
    score,
    shown_value,
    traffic,
    tried_values,
    uplink,
)
from fedraclora.commands.study.file import Study
from fedraclora.plots.axes import MEGABYTE
from fedraclora.run.ledger import Row, number
from fedraclora.terminal.tables import Table
from fedraclora.wire.fields import printable

DRAWN = 12  # curves that can be told apart


def write_results(study: Study, done: Done, out: Path, failed: Mapping[str, str]) -> None:
    """Write table, budgets and figure of the rows whose final runs are all there."""
    if records := results(study, done):
        table = Table.of(records, notes_of(study, finals(study, done), done, failed))
        table.write(out, "table")
        table.print()
    if equal := budgets(study, done):
        (out / "budgets.md").write_text(equal.markdown())
        equal.print()
    draw(study, done, out)


def results(study: Study, done: Done) -> list[dict[str, object]]:
    """Make the records of the rows whose final runs are all there."""
    records = [_record(entry, done) for entry in finals(study, done)]
    some = [title for title in ROUNDING_ERRORS if any(title in record for record in records)]
    return [record | {title: record.get(title, "") for title in some} for record in records]


def _record(entry: Entry, done: Done) -> dict[str, object]:
    study, lines, value = entry.study, entry.lines, entry.value
    tried = tried_values(study, entry.row, done)
    unstable = [v for v in tried if diverged(study, entry.row, v, done)]
    record: dict[str, object] = {
        "method": entry.title,
        str(study.grid["key"]): shown_value(study, entry.row, value, done),
        "passed over": ", ".join(f"{v:g}" for v in unstable),
        "seeds": len(lines),
        study.metric: round(entry.mean, 4),
        "std": round(entry.spread, 4),
    }
    if study.reported:  # by a paper
        reported = study.reported.get(entry.row, math.nan)
        difference = entry.mean - reported
        shown = f"{difference:+.4f}" if math.isfinite(difference) else "-"
        record |= {"reported": reported, "difference": shown}
    best = [line["best"] for line in lines if line.get("best")]
    if len(best) == len(lines):  # the rounds that early stopping calls the best
        scores = [score(point, study.metric) for point in best]
        record["at the best round"] = round(statistics.fmean(scores), 4)
        record["best round"] = round(_mean(best, "round"), 1)
        record["rounds"] = round(_mean(lines, "rounds"), 1)
    return record | {
        "uplink floats": lines[0]["uplink_floats"],
        "uplink MB": round(_mean(lines, "uplink_total") / MEGABYTE, 2),
        "downlink MB with catch-up": round(_mean(lines, "downlink_total") / MEGABYTE, 2),
        "aggregation error": entry.aggregation_error,
        **{
            title: round(_mean(lines, key), 4)
            for title, key in ROUNDING_ERRORS.items()
            if key in lines[0]
        },
    }


def _mean(lines: Sequence[Row], key: str) -> float:
    """Average a column over runs: seeds with other data on clients send other numbers of bytes."""
    return statistics.fmean(number(line, key) for line in lines)


def budgets(study: Study, done: Done) -> Table | None:
    """Compare rows at equal uplink, equal traffic and equal local steps: what a byte buys.

    The budgets are what the run that used least used in all its rounds, of all runs or of the row
    that the study names as ``budget``. A run counts with its last measured round that is within the
    budget: nothing is interpolated, a run that used less counts with its end, and the untrained
    model does not count.

    With a ``reference`` in the study, three more columns hold the rows against it, seed by seed, of
    the seeds that both have: the mean difference of final runs, with its standard error; and, for
    uplink and for traffic, the bytes at which a run first was as good as the reference's run of the
    same seed at its end, over all bytes of that run, as mean and standard deviation over the seeds
    that got there.

    Args:
        study: The study.
        done: Lines of its runs, by key.

    Returns:
        The table of the rows whose final runs are all there; None where there are no two of them.
    """
    found = {entry.row: entry for entry in finals(study, done)}
    if len(found) < 2:
        return None
    ways: dict[str, Callable[[Row], float]] = {"uplink": uplink, "traffic": traffic}
    limiting = [found[study.budget]] if study.budget in found else found.values()
    curves = [curve for entry in limiting for curve in entry.curves]
    least = {name: min(way(curve[-1]) for curve in curves) for name, way in ways.items()}
    reference = found.get(str(study.reference))
    records = []
    for entry in found.values():
        record = {
            "method": entry.title,
            f"at equal local steps, {DEVIATION}": mean_and_deviation(entry.scores, 4),
        }
        for name, way in ways.items():
            title = f"at {least[name] / MEGABYTE:.4g} MB of {name}, {DEVIATION}"
            record[title] = _within(entry, least[name], way)
        if reference is not None:
            row = reference.row
            record[f"less {row}, ± standard error"] = _difference(entry, reference)
            for name, way in ways.items():
                title = f"{name} to the final {study.metric} of {row} / its {name}, {DEVIATION}"
                record[title] = _share(entry, reference, way)
        records.append(record)
    return Table.of(records)


def _within(entry: Entry, budget: float, way: Callable[[Row], float]) -> str:
    """The metric where runs were last measured within a budget, but before they began."""
    trained = [[p for p in curve if p["round"]] for curve in entry.curves]
    points = [[p for p in curve if way(p) <= budget] for curve in trained]
    found = [score(curve[-1], entry.study.metric) for curve in points if curve]
    return of_runs(found, len(points), 4) if found else UNTRAINED


def _difference(entry: Entry, other: Entry) -> str:
    """Mean difference of runs of the same seeds, and its standard error; the seeds stand alike."""
    if entry is other:
        return ""
    theirs = dict(zip(other.seeds, other.scores, strict=True))
    mine = zip(entry.seeds, entry.scores, strict=True)
    found = [score - theirs[seed] for seed, score in mine if seed in theirs]
    error = f"{statistics.stdev(found) / math.sqrt(len(found)):.4f}" if len(found) > 1 else "-"
    return f"{statistics.fmean(found):+.4f} ± {error}"


def _share(entry: Entry, other: Entry, way: Callable[[Row], float]) -> str:
    """Bytes to the final score of the other run of its seed, over all of that run's bytes."""
    ends = dict(zip(other.seeds, zip(other.curves, other.scores, strict=True), strict=True))
    own = zip(entry.seeds, entry.curves, strict=True)
    pairs = [(mine, *ends[seed]) for seed, mine in own if seed in ends]
    shares = [
        way(point) / way(theirs[-1])
        for mine, theirs, target in pairs
        if (point := first_reaching(mine, entry.study.metric, target)) is not None
    ]
    return of_runs(shares, len(pairs), 3) if shares else "not reached"


def draw(study: Study, done: Done, out: Path) -> None:
    """Draw the final runs: metric against rounds and bytes, of the `DRAWN` best rows.

    The reference, which the others are held against, is always among them.
    """
    from fedraclora.plots.comparison import compare_figure

    found = finals(study, done)
    best = sorted(found, key=lambda entry: (entry.row != study.reference, -entry.mean))[:DRAWN]
    groups = {
        printable(entry.row): [
            [_point(study, p) for p in curve if p["round"]] for curve in entry.curves
        ]
        for entry in found
        if entry in best
    }
    if len(best) < len(found):
        beside = " and the reference" if study.reference in {e.row for e in found} else ""
        shown = len(best) - bool(beside)
        print(f"compare.png shows the {shown} best of {len(found)} rows{beside}")
    if groups:
        compare_figure(groups, study.metric, out / "compare.png")


def _point(study: Study, point: Mapping[str, object]) -> Row:
    """A point of the figure; runs of a study share a machine: their seconds say nothing."""
    metrics = {study.metric: score(point, study.metric)}
    kept = {key: value for key, value in point.items() if key != "seconds"}
    return kept | {"metrics": metrics}
