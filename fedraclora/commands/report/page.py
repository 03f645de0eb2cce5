"""Write the HTML page of a report from the files of its runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from fedraclora.binding import section
from fedraclora.commands.report.figures import (
    as_html,
    figures_of,
    lines_of,
    spread_figures,
    with_layout,
)
from fedraclora.commands.run_files import ROUNDING_ERRORS, RunFiles, read_files
from fedraclora.config.titles import method_label, run_title
from fedraclora.config.unread import as_read
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.object_registry import NAME
from fedraclora.plots.axes import MEGABYTE, Values
from fedraclora.run.folder import is_running
from fedraclora.run.ledger import (
    Row,
    column,
    headline,
    known_mean,
    number,
    reported_figures,
    round_seconds,
    withheld,
)
from fedraclora.run.statistics import traffic
from fedraclora.run.stopped import stop_kind, stop_reason
from fedraclora.run.trusted import refuse_linked
from fedraclora.terminal.opening import introduction
from fedraclora.terminal.progress import size
from fedraclora.weights.files import flatten, keep_private, make_folder

ALONE = ("output.dir", "resume")  # keys that a table of differences leaves out
SHOWN_FAILURES = 50
FILE = "report.html"
DIGITS = 12  # hexadecimal digits of a checksum in a table
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class ReportedRun(RunFiles):
    """A run as a report shows it.

    Attributes:
        stopped: Why the run stopped early, as text, or None.
        running: Whether the run is running now.
    """

    stopped: str | None = None
    running: bool = False

    @property
    def state(self) -> str:
        """The state: running, finished, interrupted, failed, diverged or stopped."""
        if self.running:
            return "running"
        return "finished" if self.summary else stop_kind(self.folder) or "stopped"

    @cached_property
    def title(self) -> str:
        """Method, data, learning rate and seed, as text."""
        return run_title(self.config)

    @property
    def measured(self) -> dict[str, object]:
        """The last measured metrics."""
        return dict(self.evaluated[-1]["metrics"]) if self.evaluated else {}

    @property
    def headline(self) -> tuple[str, float] | None:
        """The primary metric and its last value; None if nothing was measured."""
        name = headline(self.rows)
        return None if name is None else (name, self.final(name))

    @property
    def before(self) -> float:
        """The primary metric before round 1; NaN if it was not measured."""
        first = self.rows[0]
        known = self.headline is not None and not first["round"]
        return number(first, "metrics", self.headline[0]) if known and self.headline else math.nan

    @property
    def deployed(self) -> bool:
        """Whether the clients ran on nodes, so that the config does not run on one machine."""
        return self._choice("engine") == "deploy"

    @property
    def elsewhere(self) -> bool:
        """Whether only the nodes have the samples."""
        data = section(self.config, "data")
        return self.deployed and data.get("name") == "own" and data.get("samples") is None

    @property
    def failures(self) -> list[tuple[object, object, object, str]]:
        """Round, client, reason and kind of each reply that was not used."""
        return [
            (row["round"], entry["client"], entry["reason"], kind)
            for row in self.rows
            for kind, key in (("failed", "failures"), ("dropped", "dropped"))
            if isinstance(entries := row.get(key), list)
            for entry in entries
        ]

    @property
    def notes(self) -> list[tuple[object, str]]:
        """Round and text of each note."""
        lists = ((row["round"], row.get("notes")) for row in self.rows)
        return [(r, str(n)) for r, notes in lists if isinstance(notes, list) for n in notes]

    @cached_property
    def over_clients(self) -> dict[str, dict[str, float]]:
        """Statistics of each metric over the clients that measured it last."""
        return figures_of(self.folder, self.rows)

    @property
    def generations(self) -> list[tuple[object, dict[str, object]]]:
        """Round and generated texts of a language model, by prompt."""
        lists = ((row["round"], row.get("generations")) for row in self.rows)
        return [(r, dict(g)) for r, texts in lists if isinstance(texts, list) for g in texts]

    @property
    def objects(self) -> list[str]:
        """The groups of the config that were objects of a Python program."""
        return [key for key in ("model", "data", "method") if self._choice(key) == NAME]

    @property
    def reached(self) -> str:
        """The number of rounds and, if the run did not finish, of how many."""
        if self.summary:
            return f"{self.last}"
        how = {"stopped": "not running"}.get(self.state, self.state)
        return f"{self.last} of {self.config.get('rounds')}, {how}"

    @property
    def cards(self) -> dict[str, str]:
        """The results and costs of the run, as text."""
        when = "final" if self.summary else "latest"
        return {
            **{f"{when} {key}": figure(value) for key, value in self.measured.items()},
            "rounds": self.reached,
            "sent by clients": size(number(self.rows[-1], "uplink_total")),
            "sent to clients": size(number(self.rows[-1], "downlink_total")),
            "seconds, set-up included": str(self.summary.get("seconds", "")),
        }

    @property
    def facts(self) -> dict[str, str]:
        """The settings of the run, as text."""
        part = self.summary.get("task")
        task = part if isinstance(part, dict) else {}
        found, division = self.summary, task.get("partition")
        sizes = division if isinstance(division, dict) else {}
        return {
            "method": method_label(self.config),
            **{title: _share(known_mean(self.rows, key)) for title, key in ROUNDING_ERRORS.items()},
            "model": self._choice("model"),
            "data": str(task.get("source", self._choice("data"))),
            **self.begins,
            "metrics": "" if self.measured else self.unmeasured,
            "measured by clients": next(filter(None, map(withheld, self.rows[::-1])), ""),
            "clients": self.clients,
            "samples of a client": "{samples_min} to {samples_max}, median {samples_median}".format(
                **sizes
            )
            if "samples_min" in sizes
            else "",
            "samples at clients, test samples at the server": f"{task['train']}, {task['test']}"
            if {"train", "test"} <= task.keys()
            else "",
            "engine, device": ", ".join(
                filter(None, (self._choice("engine"), str(found.get("device", ""))))
            ),
            "checksum of the weights": str(found.get("weights_digest", ""))[:DIGITS],
            "versions": ", ".join(f"{n} {v}" for n, v in dict(found.get("versions", {})).items()),  # type: ignore[call-overload]
            "begun from commit": str(found.get("git") or "")[:DIGITS],
        }

    @property
    def clients(self) -> str:
        """The number of clients, and of those that take part in a round, as text."""
        every = (self.summary or self.config).get("clients")
        some = (self.summary or self.rows[-1]).get("cohort")
        part = "" if some is None else f"{some} take part in a round"
        return ", of which ".join(
            filter(None, (f"{every}" if isinstance(every, int) else "", part))
        )

    @property
    def unmeasured(self) -> str:
        """Why there are no metrics, as text; empty if no reason is recorded."""
        begins = self.summary.get("begins")
        return introduction(begins)["metrics"] if isinstance(begins, dict) else ""

    def _choice(self, group: str) -> str:
        return str(section(self.config, group).get("name", ""))

    @property
    def yaml(self) -> str:
        """The config as YAML; of a deployed run one that gives the same weights on one machine."""
        config = as_read(self.config)
        if self.deployed:
            engine = section(config, "engine")
            kept = {key: engine[key] for key in ("chunk", "threads") if key in engine}
            config["engine"] = {"name": "inline"} | kept
        return str(yaml.safe_dump(config, sort_keys=False))


def read_shown(folder: Path) -> ReportedRun:
    """Read a run folder for a report.

    Raises:
        CheckpointError: If the folder has no run, or a file is damaged.
    """
    if not (folder / "ledger.jsonl").is_file():
        raise CheckpointError(
            f"{folder} holds no run: give a folder with config.yaml and ledger.jsonl"
        )
    running = is_running(folder)  # read first: a run that ends meanwhile has a summary
    return ReportedRun(**vars(read_files(folder)), stopped=stop_reason(folder), running=running)


def page_of(runs: Sequence[ReportedRun], title: str | None = None) -> str:
    """Render the page of one or more runs as HTML.

    Args:
        runs: One or more runs.
        title: Title of the page; None for that of the run, or the number of runs.
    """
    labels = labels_of(runs)
    curves, spread = figures_of_runs(runs)
    return rendered(
        "report/report.html.j2",
        title=title or (runs[0].title if len(runs) == 1 else f"{len(runs)} runs"),
        runs=list(zip(labels, runs, strict=True)),
        curves=curves,
        spread=spread,
        facts=side_by_side(runs),
        results=results(labels, runs),
        differences=differences(runs) if len(runs) > 1 else {},
        failures=SHOWN_FAILURES,
        plotly=get_plotlyjs(),
    )


def figures_of_runs(
    runs: Sequence[ReportedRun],
) -> tuple[dict[str, go.Figure], dict[str, go.Figure]]:
    """Draw the curves of runs, and their metric's distribution over clients, by title."""
    labels = labels_of(runs)
    lines, each = lines_of(labels, [run.method for run in runs]), [*zip(labels, runs, strict=True)]
    spread = spread_figures({label: (run.folder, run.rows) for label, run in each}, lines)
    return curves_of({label: run.rows for label, run in each}, lines), spread


def rendered(template: str, **values: object) -> str:
    """Render a template of ``fedraclora.commands``; values are escaped."""
    environment = Environment(
        loader=PackageLoader("fedraclora.commands", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "html": as_html}
    return environment.get_template(template).render(values)


def side_by_side(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Return the facts of all runs, row by row, with their results if there are several."""
    rows = by_key([(run.cards if len(runs) > 1 else {}) | run.facts for run in runs])
    return {key: values for key, values in rows.items() if any(values)}


def by_key(each: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """List the values of all runs for each key that any run has; empty if a run has none."""
    keys = dict.fromkeys(key for found in each for key in found)
    return {key: [found.get(key, "") for found in each] for key in keys}


def labels_of(runs: Sequence[ReportedRun]) -> list[str]:
    """Label runs by the shortest of method, method and seed, title and folder that is unique."""
    methods, titles = [method_label(run.config) for run in runs], [run.title for run in runs]
    seeds = [f"{name}, seed {run.config['seed']}" for name, run in zip(methods, runs, strict=True)]
    folders = [str(run.folder) for run in runs]
    return next((x for x in (methods, seeds, titles) if len({*x}) == len(runs)), folders)


def results(
    labels: Sequence[str], runs: Sequence[ReportedRun]
) -> list[tuple[str, ReportedRun, str, bool]]:
    """List label, run, primary metric and whether it is the best of several runs."""
    names = {run.headline[0] for run in runs if run.headline is not None}
    values = [math.nan if run.headline is None else run.headline[1] for run in runs]
    each = [*zip(labels, runs, values, strict=True)]
    known = [value for _, run, value in each if run.summary and math.isfinite(value)]
    best = None
    if len(runs) > 1 and len(names) == 1 and known:
        lower = [name for run in runs for name in run.lower]
        best = (max if higher_is_better(names.pop(), lower) else min)(known)
    return [(label, run, figure(v), v == best and bool(run.summary)) for label, run, v in each]


def differences(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Return the settings in which runs differ: key -> the value of each run."""
    rows = by_key([{k: _word(v) for k, v in flatten(run.config).items()} for run in runs])
    return {key: row for key, row in rows.items() if len({*row}) > 1 and key not in ALONE}


def _word(value: object) -> str:
    """Write a value of a config as in a command."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _share(error: float) -> str:
    """Write a quantization error; empty if nothing was quantized."""
    return f"{error:.3g} of what was rounded" if math.isfinite(error) else ""


def figure(value: object) -> str:
    """Format a number for a table.

    Example:
        >>> figure(0.123456), figure(12), figure(None)
        ('0.1235', '12', 'not finite')
    """
    if value is None or value != value:  # noqa: PLR0124
        return "not finite"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def curves_of(
    runs: Mapping[str, Sequence[Row]], styles: Mapping[str, dict[str, object]]
) -> dict[str, go.Figure]:
    """Draw the curves of some runs.

    Args:
        runs: Ledger rows, by the label of the run.
        styles: Line styles by the same label (`lines_of`).

    Returns:
        Title -> a figure, for each quantity that at least one run recorded.
    """
    names = [name for rows in runs.values() if (name := headline(rows)) is not None]
    metric = names[0] if names else "metric"
    axes = {
        f"{metric} by round": ("round", metric, ("round",), ("metrics", metric)),
        f"{metric} by traffic, both ways": ("MB, up and down", metric, (), ("metrics", metric)),
        "loss": ("round", "loss", ("round",), ("metrics", "loss")),
        "exact match of answers": ("round", "share", ("round",), ("metrics", "exact_match")),
        "answers by likelihood": ("round", "share", ("round",), ("metrics", "choice_accuracy")),
        "training loss": ("round", "loss", ("round",), ("train_loss",)),
        **{
            f"{name.replace('_', ' ')}, as the method reports it": (
                "round",
                name.replace("_", " "),
                ("round",),
                ("report", name),
            )
            for name in reported_figures(row for rows in runs.values() for row in rows)
        },
        "sent by clients, in all": ("round", "MB", ("round",), ("uplink_total",)),
        "sent to clients, catch-up included": ("round", "MB", ("round",), ("downlink_total",)),
        "seconds of a round": ("round", "seconds", ("round",), ("seconds",)),
    }
    found = {}
    for title, (x_name, y_name, x_keys, y_keys) in axes.items():
        lines = {}
        for label, rows in runs.items():
            x = column(rows, *x_keys) if x_keys else np.array([*map(traffic, rows)]) / MEGABYTE
            y = seconds(rows) if y_keys == ("seconds",) else column(rows, *y_keys)
            kept = np.isfinite(y)
            if kept.sum() > 1:
                unit = MEGABYTE if y_name == "MB" else 1.0
                lines[label] = x[kept].tolist(), (y[kept] / unit).tolist()
        if lines and not (metric == "loss" and title.startswith("loss")):
            found[title] = line_figure(lines, x_name, y_name, styles)
    return found


def seconds(rows: Sequence[Row]) -> Values:
    """Return the wall-clock seconds of each round over all phases; NaN if not recorded."""
    return np.array([round_seconds(row) if "seconds" in row else np.nan for row in rows])


def line_figure(
    lines: Lines, x_name: str, y_name: str, styles: Mapping[str, dict[str, object]]
) -> go.Figure:
    """Draw labelled lines in one figure."""
    figure = go.Figure()
    for label, (x, y) in lines.items():
        # Plotly interprets tags in a name as markup.
        figure.add_scatter(
            x=x,
            y=y,
            name=escape(label, quote=False),
            mode="lines",
            line=styles[label],
        )
    return with_layout(figure, x_name, y_name, legend=len(lines) > 1)


def main(words: Sequence[str]) -> None:
    """Write the report of some runs."""
    parser = argparse.ArgumentParser(prog="fedraclora report", description="One HTML file of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, help=f"default: {FILE} in the first run folder")
    parser.add_argument("--title", help="default: the method and data of the runs")
    arguments = parser.parse_args(words)
    folders = [folder.expanduser() for folder in arguments.runs]
    if twice := {str(f) for f in folders if folders.count(f) > 1}:
        raise ConfigError(f"{', '.join(sorted(twice))} is named twice; name each run once")
    shown = [read_shown(folder) for folder in folders]
    out = (arguments.out or folders[0] / FILE).expanduser()
    refuse_linked(out)
    make_folder(out.parent)
    out.write_text(page_of(shown, arguments.title), encoding="utf-8")
    keep_private(out)
    print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
