"""Make the tables and figures of a study from the lines of its runs.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedraclora.commands.run_files import ROUNDING_ERRORS
from fedraclora.commands.study.entries import (
    DEVIATION,
    UNTRAINED,
    Done,
    RowResult,
    diverged,
    finals,
    of_all,
    score,
    shown_value,
    study_notes,
    tried_values,
)
from fedraclora.commands.study.file import Study
from fedraclora.plots.axes import MEGABYTE
from fedraclora.run.ledger import number
from fedraclora.run.statistics import (
    Spread,
    first_reaching,
    last,
    last_within,
    mean_curve,
    paired,
)
from fedraclora.terminal.tables import TextTable
from fedraclora.wire.fields import printable

DRAWN = 12  # most curves of a figure, so that they can be distinguished


def write_results(study: Study, done: Done, out: Path, failed: Mapping[str, str]) -> None:
    """Write and print table, budgets and figure of the rows whose final runs have finished."""
    for table in write_tables(study, done, out, failed):
        table.print()
    draw(study, finals(study, done), out)


def write_tables(
    study: Study, done: Done, out: Path, failed: Mapping[str, str] | None = None
) -> list[TextTable]:
    """Write table and budgets, and return those that have rows.

    Args:
        study: The study.
        done: Lines of finished runs, by key.
        out: The output folder.
        failed: Reasons of rows that just failed, by row.
    """
    found, written = finals(study, done), []
    if records := results(found, done):
        written.append(TextTable.of(records, study_notes(study, found, done, failed or {})))
        written[0].write(out, "table")
    if equal := budgets(study, found):
        (out / "budgets.md").write_text(equal.markdown(), encoding="utf-8")
        written.append(equal)
    return written


def results(found: Sequence[RowResult], done: Done) -> list[dict[str, object]]:
    """Make the records of rows; ``done`` has all runs of the study."""
    records = [_record(entry, done) for entry in found]
    some = [title for title in ROUNDING_ERRORS if any(title in record for record in records)]
    return [record | {title: record.get(title, "") for title in some} for record in records]


def _record(entry: RowResult, done: Done) -> dict[str, object]:
    study, lines, value = entry.study, entry.lines, entry.value
    tried = tried_values(study, entry.row, done)
    unstable = [v for v in tried if diverged(study, entry.row, v, done)]
    record: dict[str, object] = {
        "method": entry.title,
        str(study.grid["key"]): shown_value(study, entry.row, value, done),
        "passed over": ", ".join(f"{v:g}" for v in unstable),
        "seeds": len(lines),
        study.metric: round(entry.spread.mean, 4),
        "std": round(entry.spread.deviation, 4),
    }
    if study.reported:  # by a paper
        reported = study.reported.get(entry.row, math.nan)
        difference = entry.spread.mean - reported
        shown = f"{difference:+.4f}" if math.isfinite(difference) else "-"
        record |= {"reported": reported, "difference": shown}
    best = [line["best"] for line in lines if line.get("best")]
    if len(best) == len(lines):  # the rounds that early stopping calls the best
        scores = Spread.of(score(point, study.metric) for point in best)
        rounds = Spread.of(number(point, "round") for point in best)
        record["at the best round"] = round(scores.mean, 4)
        record["best round"] = round(rounds.mean, 1)
        record["rounds"] = round(entry.average("rounds"), 1)
    return record | {
        "uplink floats": lines[0]["uplink_floats"],
        "uplink MB": round(entry.average("uplink_total") / MEGABYTE, 2),
        "downlink MB with catch-up": round(entry.average("downlink_total") / MEGABYTE, 2),
        "aggregation error": entry.aggregation_error,
        **{
            title: round(entry.average(key), 4)
            for title, key in ROUNDING_ERRORS.items()
            if key in lines[0]
        },
    }


def budgets(study: Study, found: Sequence[RowResult]) -> TextTable | None:
    """Compare rows at equal uplink, equal traffic and equal local steps.

    The budgets are the total bytes of the cheapest run, of all runs or of the row that the study
    names as ``budget``. A run counts with its last measured round within the budget: nothing is
    interpolated, a cheaper run counts with its last round, and the untrained model does not count.

    If the study has a ``reference``, three more columns compare each row with it over their common
    seeds: the mean difference of the final metric with its standard error; and, for uplink and
    traffic, the bytes until a run reaches the final metric of the reference's run of the same seed,
    divided by all bytes of that run (mean and standard deviation over the seeds that reach it).

    Args:
        study: The study.
        found: The rows whose final runs have finished.

    Returns:
        The table; None if there are fewer than two rows.
    """
    if len(found) < 2:
        return None
    rows = {entry.row: entry for entry in found}
    ways = ["uplink", "traffic"]
    limiting = [rows[study.budget]] if study.budget in rows else found
    least = {way: min(last(entry.rounds)[way].min() for entry in limiting) for way in ways}
    reference = rows.get(str(study.reference))
    records = []
    for entry in found:
        record = {
            "method": entry.title,
            f"at equal local steps, {DEVIATION}": entry.spread.text(4),
        }
        for way in ways:
            title = f"at {least[way] / MEGABYTE:.4g} MB of {way}, {DEVIATION}"
            record[title] = _within(entry, least[way], way)
        if reference is not None:
            row = reference.row
            record[f"less {row}, ± standard error"] = _difference(entry, reference)
            for way in ways:
                title = f"{way} to the final {study.metric} of {row} / its {way}, {DEVIATION}"
                record[title] = _share(entry, reference, way)
        records.append(record)
    return TextTable.of(records)


def _within(entry: RowResult, budget: float, way: str) -> str:
    """Write the metric of the last measured round within a budget, without round 0."""
    found = Spread.of(last_within(entry.rounds, budget, way)["value"])
    all_ = of_all(found.count, len(entry.lines))
    return found.text(4) + all_ if found.count else UNTRAINED


def _difference(entry: RowResult, other: RowResult) -> str:
    """Write the mean difference of runs of the same seeds, and its standard error."""
    if entry is other:
        return ""
    found = paired(entry.scores, other.scores)
    error = f"{found.error:.4f}" if math.isfinite(found.error) else "-"
    return f"{found.mean:+.4f} ± {error}"


def _share(entry: RowResult, other: RowResult, way: str) -> str:
    """Write the bytes to the other row's final score, divided by all bytes of the other run."""
    both = entry.scores.index.intersection(other.scores.index)
    reached = first_reaching(entry.rounds, other.scores)[way]
    shares = Spread.of((reached / last(other.rounds)[way]).dropna())
    return shares.text(3) + of_all(shares.count, len(both)) if shares.count else "not reached"


def draw(study: Study, found: Sequence[RowResult], out: Path) -> None:
    """Draw the metric of final runs over rounds and bytes, for the `DRAWN` best rows.

    The reference is always one of them.
    """
    from fedraclora.plots.comparison import compare_figure

    order = sorted(found, key=lambda entry: (entry.row != study.reference, -entry.spread.mean))
    best = [entry.row for entry in order[:DRAWN]]
    curves = {
        printable(entry.row): mean_curve(entry.rounds[entry.rounds["round"] > 0], entry.row)
        for entry in found
        if entry.row in best
    }
    if len(best) < len(found):
        and_reference = " and the reference" if study.reference in {e.row for e in found} else ""
        shown = len(best) - bool(and_reference)
        print(f"compare.png shows the {shown} best of {len(found)} rows{and_reference}")
    if curves:
        methods = {printable(entry.row): entry.method_name for entry in found}
        compare_figure(curves, study.metric, out / "compare.png", methods=methods)
