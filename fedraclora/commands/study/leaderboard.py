"""Make the leaderboard of a study: metric, cost and reliability of each method.

It is computed from the lines of ``runs.jsonl`` only. Methods with personal models come last, since
their metric is a different one: each model is measured on its own client's class distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from fedraclora.commands import LABORATORY, require_laboratory
from fedraclora.commands.study.entries import (
    DEVIATION,
    Done,
    RowResult,
    entries,
    of_all,
    shown_error,
    shown_value,
    study_notes,
    tuned_by,
)
from fedraclora.commands.study.file import Study
from fedraclora.commands.study.run import refuse_failed, run_study
from fedraclora.compose.choices import groups
from fedraclora.compose.words import key_values, part
from fedraclora.errors import ConfigError, unknown
from fedraclora.plots.axes import MEGABYTE
from fedraclora.plots.comparison import BoardRow, leaderboard_figure
from fedraclora.run.ledger import Row, number
from fedraclora.run.statistics import Spread, first_reaching, traffic
from fedraclora.terminal.tables import TextTable
from fedraclora.wire.fields import printable

PERSONAL = "‡"
NOTES = {
    PERSONAL: "models of the clients' own, each measured under its client's own mix of classes: "
    "another metric, not ranked.",
}


def leaderboard(
    study: Study, done: Done, failed: Mapping[str, str] | None = None
) -> TextTable | None:
    """Make the table of a leaderboard; None until a row has finished.

    Its columns are the metric with its deviation over seeds, rounds and bytes to the study's
    ``target``, total bytes, aggregation error (mean over rounds, for methods that are not exact),
    the server's processor seconds per round, memory of the tensors while one client trains, and the
    tuned value.

    Args:
        study: The study.
        done: Lines of finished runs, by key.
        failed: Reasons of rows that just failed, by row.
    """
    ranked = entries(study, done)
    if not ranked:
        return None
    records = tuple(map(_record, ranked))
    marked = "".join(map(_marked, records))
    notes = [f"{sign} {text}" for sign, text in NOTES.items() if sign in marked]
    notes += study_notes(study, ranked, done, failed or {})
    key = str(study.grid["key"])
    cells = [
        _shown(study, record) | {key: shown_value(study, entry.row, entry.value, done)}
        for entry, record in zip(ranked, records, strict=True)
    ]
    return replace(TextTable.of(cells, notes), records=records)


def write_leaderboard(
    study: Study, done: Done, out: Path, failed: Mapping[str, str]
) -> TextTable | None:
    """Write leaderboard.md, leaderboard.csv and leaderboard.png; return the table."""
    made = leaderboard(study, done, failed)
    if made is None:
        return None
    made.write(out, "leaderboard")
    entrants = [
        BoardRow(
            printable(_marked(record)),
            number(record, study.metric),
            number(record, "std"),
            number(record, "uplink") / MEGABYTE,
            bool(record["exact"]),
            entry.method_name,
        )
        for entry, record in zip(entries(study, done), made.records, strict=True)
    ]
    leaderboard_figure(entrants, study.metric, out / "leaderboard.png")
    return made


def _record(entry: RowResult) -> Row:
    """Compute the numbers of a row; NaN for unknown numbers and a target that was not reached."""
    study = entry.study
    target = math.inf if study.target is None else study.target
    reached = first_reaching(entry.rounds, target)

    def at_target(figure: str) -> float:
        return Spread.of(reached[figure]).mean

    return {
        "method": entry.row,
        "personal": entry.personal,
        study.metric: entry.spread.mean,
        "std": entry.spread.deviation,
        "seeds": len(entry.lines),
        "seeds_at_target": len(reached),
        "rounds_to_target": at_target("round"),
        "uplink_to_target": at_target("uplink"),
        "traffic_to_target": at_target("traffic"),
        "uplink": entry.average("uplink_total"),
        "traffic": Spread.of_known(map(traffic, entry.lines)).mean,
        "exact": entry.exact,
        "aggregation_error": entry.average("aggregation_error"),
        "server_cpu_seconds": entry.average("server_cpu_seconds"),
        "client_bytes": entry.average("client_bytes"),
        str(study.grid["key"]): entry.value,
    }


def _shown(study: Study, record: Row) -> dict[str, str]:
    """Return the cells of a record, by column title."""
    reached, seeds = record["seeds_at_target"], record["seeds"]
    missed = of_all(reached, seeds, "seeds")
    spread = number(record, "std")

    def text(key: str, unit: float = 1.0) -> str:
        value = number(record, key) / unit
        return f"{value:.3g}" if math.isfinite(value) else "-"

    found = {
        "method": _marked(record),
        f"{study.metric}, {DEVIATION}": f"{number(record, study.metric):.4f}"
        + (f" ± {spread:.4f}" if math.isfinite(spread) else ""),
        "seeds": str(seeds),
    }
    if study.target is not None:
        titles = {
            f"rounds to {study.target:g}": text("rounds_to_target"),
            "MB up to it": text("uplink_to_target", MEGABYTE),
            "MB both ways to it": text("traffic_to_target", MEGABYTE),
        }
        found |= {title: shown + missed if reached else "-" for title, shown in titles.items()}
    return found | {
        "MB up in all": text("uplink", MEGABYTE),
        "aggregation error": shown_error(
            bool(record["exact"]), number(record, "aggregation_error")
        ),
        "server CPU s a round": text("server_cpu_seconds"),
        "client MB": text("client_bytes", MEGABYTE),
    }


def _marked(record: Mapping[str, object]) -> str:
    """Return the method's name with the marks of `NOTES` that apply."""
    return f"{record['method']} {PERSONAL if record['personal'] else ''}".rstrip()


STUDIES = LABORATORY / "studies"
KEYS = ("study", "methods", "experiment", "metric", "target", "tuned_by", "jobs", "out", "table")


def is_study(words: Sequence[str]) -> bool:
    """Check whether the arguments of ``compare`` name a study."""
    return any(word.startswith("study=") for word in words)


def compare_study(words: Sequence[str]) -> None:
    """Run the study of a command line, and write its leaderboard.

    Args:
        words: KEY=VALUE arguments.

    Raises:
        ConfigError: If an argument, the study or a row is unknown.
    """
    options, overrides = part(words, KEYS)
    key_values(overrides)  # each is KEY=VALUE
    name = str(options["study"])
    study = chosen(find(name), options, overrides)
    out = Path(str(options.get("out", Path("runs/compare") / Path(name).stem)))
    only = options.get("table") is True
    jobs = cast("int", options.get("jobs", 1))  # `run_study` checks it
    done, failed = run_study(study, out, jobs, table_only=only)
    table = write_leaderboard(study, done, out, failed)
    if table is None:
        refuse_failed(failed)
        raise ConfigError(f"{out} has no method whose final runs are all there and did not diverge")
    table.print()
    names = ("leaderboard.md", "leaderboard.csv", "leaderboard.png", "budgets.md", "compare.png")
    written = [name for name in names if (out / name).is_file()]  # a single row has no budgets
    print(f"written: {out}/{', '.join(written)} and more")
    refuse_failed(failed)


def find(name: str) -> Path:
    """Return the file of a study, from its path or its name in experiments/studies.

    Raises:
        ConfigError: If there is no such study, or this package has no studies.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    require_laboratory(f"the study {name}")
    known = {path.stem: path for path in sorted(STUDIES.glob("*.yaml"))}
    if name not in known:
        raise unknown("study", name, known)
    return known[name]


def chosen(path: Path, options: dict[str, object], overrides: Sequence[str]) -> Study:
    """Read a study, and apply the options of the command line."""
    study = Study.read(path, overrides)
    changes = {k: value for k, value in options.items() if k in {"metric", "experiment"}}
    if "target" in options:
        changes["target"] = _number("target", options["target"])
    if "methods" in options:
        rows = [row.strip() for row in str(options["methods"]).split(",")]
        known = {row: [f"method={row}"] for row in groups()["method"]} | dict(study.rows)
        more = {row: [*known[row]] for row in rows if row in known}
        changes |= {"only": rows, "more": more}
    if changes:
        study = study.changed(**changes)
    if "tuned_by" in options:
        study = tuned_by(study, Path(str(options["tuned_by"])))
    return study


def _number(key: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError as error:
        raise ConfigError(f"{key}={value!r}: give a number") from error
