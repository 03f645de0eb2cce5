"""Tables and figures of a study, always from the lines of its runs.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.study.file import Study
from experiments.tables import Table
from fedraclora.errors import ConfigError
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.run.ledger import Row, number

Plain = dict[str, object]
DRAWN = 12  # curves that can be told apart


def score(line: Plain, metric: str) -> float:
    """Final metric of a run, or that of its clients' own models; minus infinity if it diverged.

    Raises:
        ConfigError: If the run was not measured by it.
    """
    metrics = line["metrics"]
    if not isinstance(metrics, dict) or not metrics:
        return float("-inf")
    for name in (metric, f"personal_{metric}"):
        if name in metrics:
            return float(metrics[name])
    raise ConfigError(f"a run has no {metric}; it was measured by {', '.join(metrics)}")


def titled(row: str, line: Plain, metric: str) -> str:
    """Give the title of a row, which says so where the metric is that of clients' own models."""
    return f"{row} (clients' own models)" if is_personal(line, metric) else row


def is_personal(line: Plain, metric: str) -> bool:
    """Tell whether a run was measured by its clients' own models."""
    metrics = line["metrics"]
    return isinstance(metrics, dict) and bool(metrics) and metric not in metrics


def mean_score(study: Study, row: str, value: float, done: Mapping[str, Plain]) -> float:
    """How good one grid value is on the validation split; 0 where nothing is tuned.

    That is the mean over the tuning seeds of what the study chooses by, negative for a loss.
    """
    sign = 1 if higher_is_better(study.chosen_by) else -1
    lines = [done[job.key] for job in study.jobs("tune", row, [value])]
    found = [score(line, study.chosen_by) for line in lines]
    # A run that diverged is the worst, whatever is chosen by.
    scores = [sign * s if math.isfinite(s) else -math.inf for s in found]
    return statistics.fmean(scores) if scores else 0.0


def best_value(study: Study, row: str, values: list[float], done: Mapping[str, Plain]) -> float:
    """Give the value that is best on the validation split (the smaller one in a tie)."""
    return max(values, key=lambda v: (mean_score(study, row, v, done), -v))


def tuned_value(study: Study, row: str, done: Mapping[str, Plain]) -> float:
    """Give the value that the coarse grid and its refinement chose.

    A value at which a final run diverged is passed over for the next best one: validation seeds
    cannot see every instability, and a mean with a diverged run in it says nothing.
    """
    coarse = best_value(study, row, study.values(row), done)
    tried = [*study.values(row), *study.refined(coarse)]
    stable = [v for v in tried if not diverged(study, row, v, done)]
    return best_value(study, row, stable or tried, done)


def tuned_by(study: Study, other: Study, done: Mapping[str, Plain], folder: Path) -> Study:
    """Take the tuned values of another study of the same rows.

    Args:
        study: The study to run.
        other: The study that was tuned.
        done: Lines of its runs, by key.
        folder: Where it lies, for the record.

    Raises:
        ConfigError: If it has not tuned a row.
    """
    missing = [r for r in study.rows if r not in other.rows or not is_tuned(other, r, done)]
    if missing:
        raise ConfigError(f"the study in {folder} has not tuned {', '.join(missing)}")
    fixed = {row: tuned_value(other, row, done) for row in study.rows}
    text = f"{study.text}# tuned by {folder}\n"
    return replace(study, tune=None, fixed=fixed, text=text)


def diverged(study: Study, row: str, value: float, done: Mapping[str, Plain]) -> bool:
    """Tell whether a final run of this value diverged."""
    return any("diverged" in done.get(j.key, {}) for j in study.jobs("final", row, [value]))


def is_tuned(study: Study, row: str, done: Mapping[str, Plain]) -> bool:
    """Tell whether all tuning runs of a row are there."""
    if not all(j.key in done for j in study.jobs("tune", row, study.values(row))):
        return False
    refined = study.refined(best_value(study, row, study.values(row), done))
    return all(j.key in done for j in study.jobs("tune", row, refined))


def final_lines(study: Study, row: str, done: Mapping[str, Plain]) -> list[Plain]:
    """Give the final runs of a row at its tuned value; none where some have not run yet."""
    if not is_tuned(study, row, done):
        return []
    keys = [job.key for job in study.jobs("final", row, [tuned_value(study, row, done)])]
    lines = [done[key] for key in keys if key in done]
    whole = len(lines) == len(keys) and "uplink_floats" in lines[0]
    return lines if whole else []


def table(study: Study, done: Mapping[str, Plain]) -> list[dict[str, object]]:
    """Make the table of the rows whose final runs are all there."""
    found = []
    for row in study.rows:
        lines = final_lines(study, row, done)
        if not lines:
            continue
        value = tuned_value(study, row, done)
        scores = [score(line, study.metric) for line in lines]
        stable = len(scores) > 1 and not diverged(study, row, value, done)
        tried = [
            *study.values(row),
            *study.refined(best_value(study, row, study.values(row), done)),
        ]
        edge = study.tune is not None and value in {min(tried), max(tried)}
        found.append(
            {
                "method": titled(row, lines[0], study.metric),
                str(study.grid["key"]): f"{value:g}{' (edge of the grid)' if edge else ''}",
                "passed over": ", ".join(f"{v:g}" for v in tried if diverged(study, row, v, done)),
                "seeds": len(lines),
                study.metric: round(statistics.fmean(scores), 4),
                "std": round(statistics.stdev(scores), 4) if stable else float("nan"),
                **_beside(study, row, scores, lines),
                "uplink floats": lines[0]["uplink_floats"],
                "uplink MB": round(_mean(lines, "uplink_total") / 1e6, 2),
                "downlink MB with catch-up": round(_mean(lines, "downlink_total") / 1e6, 2),
                "aggregation error": round(_mean(lines, "aggregation_error"), 4),
            }
        )
    return found


def _beside(study: Study, row: str, scores: list[float], lines: list[Plain]) -> dict[str, object]:
    """What a paper reports, and the round that early stopping calls the best, where there are."""
    found: dict[str, object] = {}
    if study.reported:
        reported = study.reported.get(row, float("nan"))
        gap = statistics.fmean(scores) - reported
        found |= {"reported": reported, "difference": f"{gap:+.4f}"}
    best = [b for line in lines if isinstance(b := line.get("best"), dict)]
    if len(best) == len(lines):
        at_best = [score(b, study.metric) for b in best]
        found["at the best round"] = round(statistics.fmean(at_best), 4)
        found["best round"] = round(_mean(best, "round"), 1)
        found["rounds"] = round(_mean(lines, "rounds"), 1)
    return found


def _mean(lines: Sequence[Plain], key: str) -> float:
    """Give the mean over runs: seeds whose clients have other data send other numbers of bytes."""
    return statistics.fmean(number(line, key) for line in lines)


def cost(done: Mapping[str, Plain]) -> str:
    """Say what the runs of a study took of a processor, tuning included, where lines say it."""
    known = [number(line, "cpu_seconds") for line in done.values() if "cpu_seconds" in line]
    if not known:
        return ""
    rest = f"; {len(done) - len(known)} more did not count it" if len(known) < len(done) else ""
    return f"{len(known)} runs, tuning included, took {sum(known) / 3600:.2f} core-hours{rest}."


def write_table(rows: list[dict[str, object]], out: Path, note: str = "") -> None:
    """Write table.md and table.csv, and show the table, with a note below it."""
    if not rows:
        return
    cells = tuple(tuple(str(value) for value in row.values()) for row in rows)
    made = Table(tuple(rows[0]), cells, tuple(rows), (note,) if note else ())
    (out / "table.md").write_text(made.markdown())
    made.write_csv(out / "table.csv")
    made.print()


def draw(study: Study, done: Mapping[str, Plain], out: Path) -> None:
    """Draw the final runs: metric against rounds and bytes, of the `DRAWN` best rows."""
    from fedraclora.plots import compare_figure

    finals = {row: lines for row in study.rows if (lines := final_lines(study, row, done))}
    means = {r: statistics.fmean(score(x, study.metric) for x in ls) for r, ls in finals.items()}
    best = sorted(means, key=lambda row: -means[row])[:DRAWN]
    groups = {
        row: [[_point(study, p) for p in curve_of(line) if p["round"]] for line in lines]
        for row, lines in finals.items()
        if row in best
    }
    if len(best) < len(finals):
        print(f"compare.png shows the {len(best)} best of {len(finals)} rows")
    if groups:
        compare_figure(groups, study.metric, out / "compare.png")


def _point(study: Study, point: Row) -> Row:
    """A point of the figure; runs of a study share a machine: their seconds say nothing."""
    metrics = {study.metric: score(point, study.metric)}
    kept = {key: value for key, value in point.items() if key != "seconds"}
    return kept | {"metrics": metrics}


def curve_of(line: Plain) -> list[Row]:
    """Give the measured rounds of a run."""
    curve = line["curve"]
    if not isinstance(curve, list):
        raise TypeError(f"the curve of {line['key']} is a {type(curve).__name__}, not a list")
    return curve


def first_reaching(points: Sequence[Row], metric: str, target: float) -> Row | None:
    """Give the first measured round whose metric (more is better) is no worse than a target."""
    return next((p for p in points if score(p, metric) >= target), None)
