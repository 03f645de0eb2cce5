"""The page of a report, from the files of its runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from experiments.progress import size
from experiments.report.figures import curves
from experiments.reports import ROUNDING, Run, read_run
from fedraclora.config.schema import section
from fedraclora.errors import CheckpointError
from fedraclora.objects import NAME
from fedraclora.run.folder import method_label, run_title
from fedraclora.run.ledger import known_mean, number
from fedraclora.run.stopped import stop_reason
from fedraclora.weights.files import flatten

ALONE = ("seed", "output.dir", "resume")  # keys in which runs of one table may differ unnoticed
SHOWN_FAILURES = 50


@dataclass(frozen=True)
class Shown(Run):
    """A run as a report shows it.

    Attributes:
        stopped: Why it stopped before its end, in words; None if nothing says so.
    """

    stopped: str | None = None

    @cached_property
    def title(self) -> str:
        """Method, data, step size and seed."""
        return run_title(self.config)

    @property
    def measured(self) -> dict[str, object]:
        """The metrics where they were last measured."""
        return dict(self.evaluated[-1]["metrics"]) if self.evaluated else {}

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

    @property
    def generations(self) -> list[tuple[object, dict[str, object]]]:
        """Round and texts of what a language model was asked and wrote."""
        lists = ((row["round"], row.get("generations")) for row in self.rows)
        return [(r, dict(g)) for r, texts in lists if isinstance(texts, list) for g in texts]

    @property
    def objects(self) -> list[str]:
        """The groups of the config that stand for objects of a Python program."""
        return [key for key in ("model", "data", "method") if self._choice(key) == NAME]

    @property
    def facts(self) -> dict[str, str]:
        """What ran, in words."""
        part = self.summary.get("task")
        task = part if isinstance(part, dict) else {}
        found, division = self.summary, task.get("partition")
        sizes = division if isinstance(division, dict) else {}
        return {
            "method": method_label(self.config),
            **{name: figure(value) for name, value in self.measured.items()},
            "rounds": str(self.last),
            "sent by clients": size(number(self.rows[-1], "uplink_total")),
            "sent to clients": size(number(self.rows[-1], "downlink_total")),
            **{title: _share(known_mean(self.rows, key)) for title, key in ROUNDING.items()},
            "seconds": str(found.get("seconds", "")),
            "model": self._choice("model"),
            "data": str(task.get("source", self._choice("data"))),
            **self.begins,
            "clients": f"{found.get('clients', self.config.get('clients'))}, of which "
            f"{found.get('cohort', self.config.get('cohort'))} take part in a round",
            "samples of a client": "{samples_min} to {samples_max}, median {samples_median}".format(
                **sizes
            )
            if "samples_min" in sizes
            else "",
            "samples to train on, to test on": f"{task['train']}, {task['test']}"
            if {"train", "test"} <= task.keys()
            else "",
            "engine, device": f"{self._choice('engine')}, {found.get('device', '')}",
            "digest of the weights": str(found.get("weights_digest", "")),
            "versions": ", ".join(f"{n} {v}" for n, v in dict(found.get("versions", {})).items()),  # type: ignore[call-overload]
            "begun from commit": str(found.get("git") or ""),
        }

    def _choice(self, group: str) -> str:
        return str(section(self.config, group).get("name", ""))

    @property
    def yaml(self) -> str:
        """The config as it is written."""
        return str(yaml.safe_dump(self.config, sort_keys=False))


def read_shown(folder: Path) -> Shown:
    """Read a run folder.

    Raises:
        CheckpointError: If there is no run, or a file of it is damaged.
    """
    if not (folder / "ledger.jsonl").is_file():
        raise CheckpointError(
            f"{folder} holds no run: a folder with config.yaml and ledger.jsonl is wanted"
        )
    return Shown(**vars(read_run(folder)), stopped=stop_reason(folder))


def page_of(runs: Sequence[Shown], title: str | None = None) -> str:
    """Write the page.

    Args:
        runs: One or more.
        title: Of the page; None: that of the run, or what the runs have in common.
    """
    labels = labels_of(runs)
    environment = Environment(
        loader=PackageLoader("experiments.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "size": size}
    return environment.get_template("report.html.j2").render(
        title=title or (runs[0].title if len(runs) == 1 else f"{len(runs)} runs"),
        runs=list(zip(labels, runs, strict=True)),
        curves=curves({label: run.rows for label, run in zip(labels, runs, strict=True)}),
        facts=side_by_side(runs),
        differences=differences(runs) if len(runs) > 1 else {},
        failures=SHOWN_FAILURES,
        plotly=get_plotlyjs(),
    )


def side_by_side(runs: Sequence[Shown]) -> dict[str, list[str]]:
    """Give the facts of all runs, those that no run has left out."""
    each = [run.facts for run in runs]
    rows = {key: [facts[key] for facts in each] for key in each[0]}
    return {key: values for key, values in rows.items() if any(values)}


def labels_of(runs: Sequence[Shown]) -> list[str]:
    """Name each run by the shortest of method, title and folder that tells all of them apart."""
    methods, titles = [method_label(run.config) for run in runs], [run.title for run in runs]
    folders = [str(run.folder) for run in runs]
    return next((x for x in (methods, titles) if len({*x}) == len(runs)), folders)


def differences(runs: Sequence[Shown]) -> dict[str, list[object]]:
    """Give the settings in which runs differ: key -> the value of each run."""
    flats = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for found in flats for key in found)
    values = {key: [found.get(key, "-") for found in flats] for key in keys}
    return {
        key: row
        for key, row in values.items()
        if any(value != row[0] for value in row) and key not in ALONE[1:]
    }


def _share(error: float) -> str:
    """Write a rounding error; empty where nothing was rounded."""
    return f"{error:.3g} of what was rounded" if math.isfinite(error) else ""


def figure(value: object) -> str:
    """Write a number as a table shows it.

    Example:
        >>> figure(0.123456), figure(12), figure(None)
        ('0.1235', '12', 'not finite')
    """
    if value is None:
        return "not finite"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
