"""Bring results into the form in which they are kept.

    python -m fedraclora.experiments.records [NAME ...]

NAME is a folder of ``experiments/results``; without one, it is done for all. No run is repeated.

- Tables are made anew from the runs beside them. A test holds every table to its runs.
- What has run is packed, as ``runs.jsonl.xz``: readers find it by its plain name
  (`fedraclora.run.packed`), and a study that goes on unpacks it.
- A figure that no page shows is removed: ``fedraclora study STUDY.yaml --table`` draws it again.
  Others are stored in `COLORS` colors, which takes a third of the bytes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from PIL import Image

from fedraclora.commands import RESULTS
from fedraclora.commands.status import reported
from fedraclora.commands.study import leaderboard, tables
from fedraclora.commands.study.entries import read_results
from fedraclora.errors import unknown
from fedraclora.experiments import found_rates, frontier
from fedraclora.experiments.authors.__main__ import write_table as write_table_of_authors
from fedraclora.experiments.faults.campaign import faults_table
from fedraclora.experiments.faults.network_campaign import network_table
from fedraclora.experiments.faults.trials import TrialOutcome
from fedraclora.experiments.pages import PAGES
from fedraclora.experiments.slow_links import Record as SlowLinks
from fedraclora.experiments.slow_links import write_slow_links
from fedraclora.experiments.theory import figures as theory
from fedraclora.experiments.wire_bytes import wire_table
from fedraclora.run import packed


def tables_of_study(folder: Path, out: Path) -> None:
    """Write the tables of a study; its leaderboard where the folder has one."""
    study, done = read_results(folder)
    tables.write_tables(study, done, out)
    if (folder / "leaderboard.md").is_file():
        made = leaderboard.leaderboard(study, done)
        if made is not None:
            made.write(out, "leaderboard")


def tables_of_frontier(folder: Path, out: Path) -> None:
    """Write the tables of the frontier, which are made from the studies beside its folder."""
    frontier.write_frontier(frontier.read_tasks(folder.parent), out)


def tables_of_theory(folder: Path, out: Path) -> None:
    """Write the tables of the bounds that were measured."""
    report = json.loads(packed.read_text(folder / "theory.json"))
    text = "\n".join(table.markdown() for table in theory.report_tables(report))
    (out / "table.md").write_text(text, encoding="utf-8")


def table_of_faults(folder: Path, out: Path) -> None:
    """Write the table of faults of clients and processes."""
    outcomes = [TrialOutcome(**line) for line in lines_of(folder / "campaign.jsonl")]
    (out / "table.md").write_text(faults_table(outcomes), encoding="utf-8")


def table_of_network_faults(folder: Path, out: Path) -> None:
    """Write the table of faults of networks and hosts."""
    said = lines_of(folder / "campaign.jsonl")
    (out / "table.md").write_text(network_table(said), encoding="utf-8")


def table_of_wire(folder: Path, out: Path) -> None:
    """Write the table of bytes on the wire."""
    found = json.loads((folder / "bytes.json").read_text(encoding="utf-8"))["bytes"]
    (out / "table.md").write_text(wire_table(found), encoding="utf-8")


def tables_of_found_rates(folder: Path, out: Path) -> None:
    """Write the tables of learning rates that are found."""
    for task in found_rates.TASKS:
        found_rates.Ladder(task, folder=folder).write(out)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in packed.read_text(path).splitlines()]


COLORS = 128  # of a figure; more cannot be told from them
IMAGE = re.compile(r"experiments/results/([^)\s]+\.png)")
PACKED = ("runs.jsonl", "campaign.jsonl", "theory.json")  # what tables are made from

# By the folder of results: what writes its tables into another folder.
MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "authors": write_table_of_authors,
    "frontier": tables_of_frontier,
    "theory": tables_of_theory,
    "faults": table_of_faults,
    "network_faults": table_of_network_faults,
    "network_faults_alone": table_of_network_faults,
    "found_rates": tables_of_found_rates,
    "slow_links": lambda folder, out: write_slow_links(SlowLinks(folder), out),
    "wire": table_of_wire,
    **{path.parent.name: tables_of_study for path in sorted(RESULTS.glob("*/study.yaml"))},
}


def shown_figures() -> set[Path]:
    """Find the figures of the results that pages show."""
    return {RESULTS / name for page in PAGES for name in IMAGE.findall(page.read_text("utf-8"))}


def keep_figures(folder: Path, shown: Collection[Path]) -> None:
    """Remove the figures that are not shown, and store the others in few colors."""
    for path in folder.glob("*.png"):
        if path not in shown:
            path.unlink()
            print(f"removed, since no page shows it: {path}")
            continue
        with Image.open(path) as image:
            if image.mode == "P":
                continue
            few = image.convert("RGB").quantize(COLORS, kmeans=2, dither=Image.Dither.NONE)
        few.save(path, optimize=True)


@reported
def main() -> int:
    """Make tables anew, pack runs and tidy figures, of some folders or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    shown = shown_figures()
    names = parser.parse_args().names or [*MAKERS]
    for name in names:
        if name not in MAKERS:
            raise unknown("folder of results", name, MAKERS)
        MAKERS[name](RESULTS / name, RESULTS / name)
        keep_figures(RESULTS / name, shown)
        for file in PACKED:
            packed.compress(RESULTS / name / file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
