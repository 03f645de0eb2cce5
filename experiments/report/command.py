"""``fedraclora report RUN [RUN ...]``: one HTML file, without links to anything outside it.

It tells what ran, shows the curves (hover to read a value), bytes both ways, clients and failures,
generated texts, and how to run it again; several runs stand side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fedraclora.errors import ConfigError
from fedraclora.experiments.report.page import page_of, read_shown
from fedraclora.experiments.status import reported

NAME = "report.html"


@reported
def main() -> int:
    """Write the report of the runs that are named."""
    parser = argparse.ArgumentParser(prog="fedraclora report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, help=f"default: {NAME} in the first run folder")
    parser.add_argument("--title", help="default: the method and data of the runs")
    arguments = parser.parse_args(sys.argv[1:])
    folders = [folder.expanduser() for folder in arguments.runs]
    if twice := {str(f) for f in folders if folders.count(f) > 1}:
        raise ConfigError(f"{', '.join(sorted(twice))} is named twice; name each run once")
    shown = [read_shown(folder) for folder in folders]
    out = (arguments.out or folders[0] / NAME).expanduser()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_of(shown, arguments.title), encoding="utf-8")
    print(f"written to {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
