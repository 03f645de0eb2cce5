"""The leaderboard of a study: what each method reaches, what it costs, and how far to trust it.

From the lines of ``runs.jsonl`` alone. Methods with models of the clients' own stand last, since
their metric is another one: each model is measured under its client's own mix of classes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.study.budget import traffic, uplink
from experiments.study.entries import Entry, entries, is_unverified
from experiments.study.file import Study
from experiments.study.table import cost
from experiments.tables import Table
from fedraclora.plots import MEGABYTE, Entrant, leaderboard_figure
from fedraclora.run.ledger import Row, number

Plain = dict[str, object]
NOTES = {
    "†": "in part unverified against its paper; its docstring says what (docs/methods.md).",
    "‡": "models of the clients' own, each measured under its client's own mix of classes: "
    "another metric, not ranked.",
}


def leaderboard(study: Study, done: Mapping[str, Plain]) -> Table | None:
    """Make the table; None as long as no row has run to its end.

    Its columns are the metric with its spread over the seeds, rounds and bytes until the study's
    ``target`` is reached, bytes in all, the error of aggregation (of methods that are not exact:
    the mean over the rounds), processor seconds of the server a round, tensors that live while one
    client trains, and the tuned value.

    Args:
        study: The study.
        done: Lines of its runs, by key.
    """
    ranked = entries(study, done)
    if not ranked:
        return None
    records = tuple(map(_record, ranked))
    columns = _columns(study)
    cells = tuple(tuple(show(record) for show in columns.values()) for record in records)
    marked = "".join(_marks(record) for record in records)
    notes = [f"{sign} {text}" for sign, text in NOTES.items() if sign in marked]
    missing = [row for row in study.rows if row not in {entry.row for entry in ranked}]
    if missing:
        notes.append(f"Not run to the end, or diverged at every value: {', '.join(missing)}.")
    if spent := cost(done):
        notes.append(spent)
    return Table(tuple(columns), cells, records, tuple(notes))


def write_leaderboard(study: Study, done: Mapping[str, Plain], out: Path) -> Table | None:
    """Write leaderboard.md, leaderboard.csv and leaderboard.png; give the table."""
    made = leaderboard(study, done)
    if made is None:
        return None
    (out / "leaderboard.md").write_text(made.markdown(), encoding="utf-8")
    made.write_csv(out / "leaderboard.csv")
    entrants = [
        Entrant(
            f"{record['method']} {_marks(record)}".rstrip(),
            number(record, study.metric),
            number(record, "std"),
            number(record, "uplink") / MEGABYTE,
            bool(record["exact"]),
        )
        for record in made.records
    ]
    leaderboard_figure(entrants, study.metric, out / "leaderboard.png")
    return made


def _record(entry: Entry) -> Plain:
    """The numbers of an entry; NaN where something is not known or was not reached."""
    points = entry.reached()

    def at(figure: Callable[[Row], float]) -> float:
        return statistics.fmean(map(figure, points)) if points else math.nan

    def mean(key: str) -> float:
        return entry.average(lambda line: number(line, key))

    return {
        "method": entry.row,
        "verified": not is_unverified(type(entry.method)),
        "personal": entry.personal,
        entry.study.metric: entry.mean,
        "std": entry.spread,
        "seeds": len(entry.lines),
        "seeds_at_target": len(points),
        "rounds_to_target": at(lambda p: number(p, "round")),
        "uplink_to_target": at(uplink),
        "traffic_to_target": at(traffic),
        "uplink": entry.average(uplink),
        "traffic": entry.average(traffic),
        "exact": entry.method.traits.exact,
        "aggregation_error": mean("aggregation_error"),
        "server_cpu_seconds": mean("server_cpu_seconds"),
        "client_bytes": mean("client_bytes"),
        str(entry.study.grid["key"]): entry.value,
    }


def _columns(study: Study) -> dict[str, Callable[[Plain], str]]:
    """Titles, and what each shows of a record."""

    def shown(key: str, unit: float = 1.0) -> Callable[[Plain], str]:
        return lambda r: _text(number(r, key) / unit)

    def reached(key: str, unit: float = 1.0) -> Callable[[Plain], str]:
        return lambda r: _text(number(r, key) / unit) + _share(r) if r["seeds_at_target"] else "-"

    found: dict[str, Callable[[Plain], str]] = {
        "method": lambda r: f"{r['method']} {_marks(r)}".rstrip(),
        study.metric: lambda r: _with_spread(number(r, study.metric), number(r, "std")),
        "seeds": lambda r: str(r["seeds"]),
    }
    if study.target is not None:
        found[f"rounds to {study.target:g}"] = reached("rounds_to_target")
        found["MB up to it"] = reached("uplink_to_target", MEGABYTE)
        found["MB both ways to it"] = reached("traffic_to_target", MEGABYTE)
    return found | {
        "MB up in all": shown("uplink", MEGABYTE),
        "exactness error": _exactness,
        "server CPU s a round": shown("server_cpu_seconds"),
        "client MB": shown("client_bytes", MEGABYTE),
        str(study.grid["key"]): lambda r: f"{number(r, str(study.grid['key'])):g}",
    }


def _marks(record: Plain) -> str:
    """The signs of `NOTES` that a method needs."""
    unverified, personal = NOTES
    return (unverified if not record["verified"] else "") + (personal if record["personal"] else "")


def _share(record: Plain) -> str:
    """How many of the seeds reached the target, where not all did."""
    there, all_ = record["seeds_at_target"], record["seeds"]
    return "" if there == all_ else f" ({there} of {all_} seeds)"


def _with_spread(mean: float, spread: float) -> str:
    return f"{mean:.4f} ± {spread:.4f}" if math.isfinite(spread) else f"{mean:.4f}"


def _exactness(record: Plain) -> str:
    """The error of a method that is not exact; the contract suite holds the others to be."""
    if record["exact"]:
        return "exact"
    error = number(record, "aggregation_error")
    return _text(error) if error > 0 else "not measured"


def _text(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"
