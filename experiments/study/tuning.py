"""What the runs of a study say of its rows: the tuned value, and the final runs at that value."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedraclora.errors import ConfigError
from fedraclora.evaluation.metrics import higher_is_better, lower_of
from fedraclora.experiments.study.file import Study, check_split, row_config

Line = dict[str, Any]  # of runs.jsonl
Done = Mapping[str, Line]  # by key


def read_lines(path: Path) -> dict[str, Line]:
    """Read what has run, by key; a torn last line is left out."""
    done: dict[str, Line] = {}
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            done[line["key"]] = line
    return done


def score(line: Mapping[str, Any], metric: str) -> float:
    """Final metric of a run, or that of its clients' own models; minus infinity if it diverged.

    Raises:
        ConfigError: If the run was not measured by it.
    """
    metrics = line["metrics"]
    if not metrics:
        return -math.inf
    for name in (metric, f"personal_{metric}"):
        if name in metrics:
            return float(metrics[name])
    raise ConfigError(
        f"a run has no metric {metric}; its metrics are {', '.join(metrics)}: name one of them as "
        "the study's metric (what has run is kept)"
    )


def mean_score(study: Study, row: str, value: float, done: Done) -> float:
    """How good one grid value is on the validation split; 0 where nothing is tuned.

    That is the mean over the tuning seeds of what the study chooses by, negative for a loss.
    """
    lines = [done[job.key] for job in study.jobs("tune", row, [value])]
    lower = [name for line in lines for name in lower_of(line.get("task"))]
    sign = 1 if higher_is_better(study.chosen_by, lower) else -1
    found = [score(line, study.chosen_by) for line in lines]
    # A run that diverged is the worst, whatever is chosen by.
    scores = [sign * s if math.isfinite(s) else -math.inf for s in found]
    return statistics.fmean(scores) if scores else 0.0


def best_value(study: Study, row: str, values: list[float], done: Done) -> float:
    """Choose the value that is best on the validation split (the smaller one in a tie)."""
    return max(values, key=lambda v: (mean_score(study, row, v, done), -v))


def tried_values(study: Study, row: str, done: Done) -> list[float]:
    """List the values of the coarse grid, and those around the best of them."""
    coarse = study.values(row)
    return [*coarse, *study.refined(best_value(study, row, coarse, done))]


def tuned_value(study: Study, row: str, done: Done) -> float:
    """Return the value that the coarse grid and its refinement chose.

    A value at which a final run diverged is passed over for the next best one: validation seeds
    cannot see every instability, and a mean with a diverged run in it says nothing.
    """
    tried = tried_values(study, row, done)
    stable = [v for v in tried if not diverged(study, row, v, done)]
    return best_value(study, row, stable or tried, done)


def tuned_by(study: Study, folder: Path) -> Study:
    """Take the tuned values of another study of the same rows.

    Args:
        study: The study to run.
        folder: The results of the study that was tuned.

    Raises:
        ConfigError: If it has not tuned a row, or not on a validation split.
    """
    other, done = Study.read(folder / "study.yaml"), read_lines(folder / "runs.jsonl")
    missing = [r for r in study.rows if r not in other.rows or not is_tuned(other, r, done)]
    if missing:
        raise ConfigError(f"the study in {folder} has not tuned {', '.join(missing)}")
    for row in study.rows:
        if (config := row_config(other, row, "tune")) is not None:
            check_split(other, "tune", config)
    fixed = {row: tuned_value(other, row, done) for row in study.rows}
    text = f"{study.text}# tuned by {folder}\n"
    return replace(study, tune=None, fixed=fixed, text=text)


def diverged(study: Study, row: str, value: float, done: Done) -> bool:
    """Check whether a final run of this value diverged."""
    return any("diverged" in done.get(j.key, {}) for j in study.jobs("final", row, [value]))


def shown_value(study: Study, row: str, value: float, done: Done) -> str:
    """Write a tuned value, marked where the grid ends there: a better one may lie beyond it."""
    tried = tried_values(study, row, done)
    edge = study.tune is not None and value in {min(tried), max(tried)}
    return f"{value:g}{' (edge of the grid)' if edge else ''}"


def is_tuned(study: Study, row: str, done: Done) -> bool:
    """Check whether all tuning runs of a row are there."""

    def ran(values: list[float]) -> bool:
        return all(job.key in done for job in study.jobs("tune", row, values))

    return ran(study.values(row)) and ran(tried_values(study, row, done))


def final_lines(study: Study, row: str, done: Done) -> list[Line]:
    """Read the final runs of a row at its tuned value; none where some have not run yet."""
    if not is_tuned(study, row, done):
        return []
    jobs = study.jobs("final", row, [tuned_value(study, row, done)])
    lines = [done[job.key] for job in jobs if job.key in done]
    return lines if len(lines) == len(jobs) and "uplink_floats" in lines[0] else []
