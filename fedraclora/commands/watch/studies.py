"""Collect what the page shows of a study, from its ``runs.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedraclora.commands.report.figures import lines_of, with_layout
from fedraclora.commands.report.page import figure
from fedraclora.commands.study.entries import Line, read_results
from fedraclora.plots.axes import MEGABYTE
from fedraclora.run import packed
from fedraclora.run.ledger import number
from fedraclora.run.statistics import traffic

if TYPE_CHECKING:
    import plotly.graph_objects as go

STUDY, RUNS = "study.yaml", "runs.jsonl"
PHASES = {"tune": "runs to tune", "final": "final runs"}


def holds_study(folder: Path) -> bool:
    """Check whether a folder belongs to a started study."""
    return (folder / STUDY).is_file() and packed.exists(folder / RUNS)


def study_status(folder: Path) -> dict[str, Any]:
    """Describe a study: finished and planned runs of each row.

    The planned number is an estimate: some rows get no final runs, and some get a second value.
    """
    study, done = read_results(folder)
    lines = [*done.values()]
    planned, table = 0, []
    for row in study.rows:
        jobs = {
            "tune": len(study.jobs("tune", row, [*study.values(row), *study.refined(1.0)])),
            "final": len(study.jobs("final", row, study.values(row)[:1])),
        }
        planned += sum(jobs.values())
        own = {phase: _of(lines, row, phase) for phase in jobs}
        scores = [_final(line, study.metric) for line in own["final"] or own["tune"]]
        counts = {PHASES[p]: f"{len(own[p])} of {count}" for p, count in jobs.items() if count}
        known = [value for value in scores if math.isfinite(value)]
        mean = figure(fmean(known)) if known else ""
        table.append({"row": row, **counts, f"mean {study.metric}": mean})
    finished = len(lines) >= planned
    return {
        "title": f"Study {folder.resolve().name}: {study.metric} of {len(study.rows)} rows",
        "state": "finished" if finished else "unfinished",
        "text": f"{len(lines)} runs of about {max(planned, len(lines))}",
        "done": len(lines),
        "of": max(planned, len(lines)),
        "table": table,
    }


def study_figures(folder: Path) -> dict[str, go.Figure]:
    """Draw the first final run of each row, or its last tuning run if it has none."""
    import plotly.graph_objects as go

    study, done = read_results(folder)
    lines = [*done.values()]
    chosen: dict[str, Line] = {}
    for row in study.rows:
        if runs := _of(lines, row, "final")[:1] or _of(lines, row, "tune")[-1:]:
            chosen[row] = runs[0]
    styles = lines_of([*chosen], [*chosen])
    found: dict[str, go.Figure] = {}
    for title, x_name in (("by round", "round"), ("by traffic, both ways", "MB, up and down")):
        drawn = go.Figure()
        for row, line in chosen.items():
            points = [point for point in line.get("curve", []) if study.metric in point["metrics"]]
            x = [p["round"] if x_name == "round" else traffic(p) / MEGABYTE for p in points]
            y = [point["metrics"][study.metric] for point in points]
            name = escape(row, quote=False)
            drawn.add_scatter(x=x, y=y, name=name, mode="lines", line=styles[row])
        if drawn.data:
            layout = {"legend": True, "log": x_name != "round"}
            found[f"{study.metric} {title}"] = with_layout(drawn, x_name, study.metric, **layout)
    return found


def _of(lines: list[Line], row: str, phase: str) -> list[Line]:
    return [line for line in lines if (line["row"], line["phase"]) == (row, phase)]


def _final(line: Mapping[str, Any], metric: str) -> float:
    return number(line, "metrics", metric)
