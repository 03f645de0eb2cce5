"""Make the tables of kept results anew from the runs that are kept beside them.

    python -m fedraclora.experiments.records [NAME ...]

NAME is a folder of ``experiments/results``; without one, all tables are made. No run is repeated.
A test holds every table to its runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fedraclora.commands import RESULTS
from fedraclora.commands.status import reported
from fedraclora.commands.study import leaderboard, tables
from fedraclora.commands.study.entries import read_results
from fedraclora.errors import unknown
from fedraclora.experiments import frontier


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
    frontier.write_tables(frontier.read_tasks(folder.parent), out)


# By the folder of results: what writes its tables into another folder.
MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "frontier": tables_of_frontier,
    **{path.parent.name: tables_of_study for path in sorted(RESULTS.glob("*/study.yaml"))},
}


@reported
def main() -> int:
    """Make the tables of some folders, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    names = parser.parse_args().names or [*MAKERS]
    for name in names:
        if name not in MAKERS:
            raise unknown("folder of results", name, MAKERS)
        MAKERS[name](RESULTS / name, RESULTS / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
