"""Collect what the page shows of a tuning, from ``tune.db``, which it only reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedraclora.commands.report.figures import with_layout
from fedraclora.commands.report.page import figure
from fedraclora.errors import CheckpointError
from fedraclora.imports import import_extra
from fedraclora.plots.axes import MEGABYTE
from fedraclora.plots.palette import line_styles

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from optuna.study import Study
    from optuna.trial import FrozenTrial

DATABASE = "tune.db"
SHOWN = 15  # trials, the last ones
ENDED = {"COMPLETE": "done", "FAIL": "left out", "RUNNING": "running", "WAITING": "waits"}


def read_study(folder: Path) -> Study:
    """Open the trials of a tuning, read-only.

    Raises:
        CheckpointError: If the database has no trials yet.
    """
    optuna = import_extra("optuna", f"The page of {folder}, a tuning,")
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = f"sqlite:///file:{(folder / DATABASE).resolve()}?mode=ro&uri=true"
    try:
        return optuna.load_study(study_name="tune", storage=place)
    except (KeyError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise CheckpointError(f"{folder / DATABASE} has no trials yet ({error})") from error


def tuning_status(folder: Path) -> dict[str, Any]:
    """Describe a tuning: the spent budget, the best metric, and the last trials."""
    study = read_study(folder)
    budget, of = study.user_attrs.get("budget", {}), study.user_attrs.get("of", {}).get("tune", {})
    trials = study.get_trials(deepcopy=False)
    running = [trial for trial in trials if trial.state.name == "RUNNING"]
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    spent, most, unit = _spent(done, trials, budget)
    best = _best(study, done)
    durations = [(t.datetime_complete - t.datetime_start).total_seconds() for t in done]
    left = (most - spent) * fmean(durations) if durations and unit == "runs" and running else None
    return {
        "title": f"Tuning of {of.get('metric', 'a task')}",
        "state": "running" if running else "finished" if most and spent >= most else "stopped",
        "text": f"{spent:.4g} of {most:.4g} {unit}" if most else f"{len(done)} runs",
        "done": spent,
        "of": most or len(done),
        "left": left,
        "seconds": fmean(durations) if durations else None,
        "written": max((_time(trial) for trial in trials), default=time.time()),
        "headline": {
            "name": f"best {of.get('metric', '')}",
            "value": "" if best is None else figure(best),
        },
        "cards": {
            name: str(count)
            for name, count in (("running", len(running)), ("runs at their ends", len(done)))
            if count
        },
        "table": [_row(trial) for trial in trials if trial.state.name != "WAITING"][-SHOWN:][::-1],
    }


def _spent(
    done: list[FrozenTrial], trials: list[FrozenTrial], budget: dict[str, Any]
) -> tuple[float, float, str]:
    """Return spent amount, limit and unit of the part of the budget that is used up most."""
    cores = sum(trial.user_attrs.get("core_seconds", 0.0) for trial in trials) / 3600
    size = sum(trial.user_attrs.get("bytes", 0.0) for trial in trials) / 1e6
    found = {"runs": float(len(done)), "core_hours": cores, "megabytes": size}
    limits = [(found[key] / budget[key], key) for key in found if budget.get(key)]
    if not limits:
        return float(len(done)), 0.0, "runs"
    key = max(limits)[1]
    return found[key], float(budget[key]), key.replace("_", "-")


def _best(study: Study, done: list[FrozenTrial]) -> float | None:
    ends = [float(t.user_attrs["curve"][-1]["value"]) for t in done if t.user_attrs.get("curve")]
    higher = study.directions[0].name == "MAXIMIZE"
    return (max if higher else min)(ends) if ends else None


def _time(trial: FrozenTrial) -> float:
    at = trial.datetime_complete or trial.datetime_start or datetime.now()
    return at.timestamp()


def _row(trial: FrozenTrial) -> dict[str, str]:
    curve = trial.user_attrs.get("curve")
    why = str(trial.user_attrs.get("ended") or trial.user_attrs.get("refused") or "")
    return {
        "run": str(trial.number),
        "state": ENDED[trial.state.name],
        "metric": figure(curve[-1]["value"]) if curve else "",
        "settings": " ".join(f"{key}={_short(value)}" for key, value in trial.params.items()),
        "why": why,
    }


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def tuning_figures(folder: Path) -> dict[str, go.Figure]:
    """Draw the metric of each trial by traffic and by number, in the color of its method."""
    study = read_study(folder)
    clients = study.user_attrs.get("budget", {}).get("clients") or 1
    metric = str(study.user_attrs.get("of", {}).get("tune", {}).get("metric", "metric"))
    import plotly.graph_objects as go

    by_bytes, by_number = go.Figure(), go.Figure()
    methods = dict(_by_method(study))
    for look, (method, trials) in zip(line_styles([*methods]), methods.items(), strict=True):
        style = {"color": look.color}
        for first, trial in enumerate(trials):
            curve = trial.user_attrs["curve"]
            by_bytes.add_scatter(
                x=[point["traffic"] / MEGABYTE / clients for point in curve if point["traffic"]],
                y=[point["value"] for point in curve if point["traffic"]],
                name=method, legendgroup=method, showlegend=not first, mode="lines+markers",
                line=style | {"width": 1}, marker=style | {"size": 4},
                text=[f"run {trial.number}, round {p['round']}" for p in curve if p["traffic"]],
            )  # fmt: skip
        by_number.add_scatter(
            x=[trial.number for trial in trials],
            y=[trial.user_attrs["curve"][-1]["value"] for trial in trials],
            name=method, mode="markers", marker=style | {"size": 8},
        )  # fmt: skip
    if not by_number.data:
        return {}
    axes = {"MB a client, both ways": (by_bytes, True), "run": (by_number, False)}
    titles = (f"{metric} by traffic, of every run", f"{metric} at the end of each run")
    return {
        title: with_layout(drawn, x_name, metric, legend=True, log=log)
        for title, (x_name, (drawn, log)) in zip(titles, axes.items(), strict=True)
    }


def _by_method(study: Study) -> Iterator[tuple[str, list[FrozenTrial]]]:
    """Group the trials with a measured metric by their method."""
    found: dict[str, list[FrozenTrial]] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.user_attrs.get("curve"):
            found.setdefault(str(trial.params.get("method", "runs")), []).append(trial)
    yield from found.items()
