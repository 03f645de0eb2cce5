"""``fedraclora evaluate RUN``: the metrics of a finished run on its own samples, or on new ones."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedraclora.launch import measuring_run
from fedraclora.terminal.progress import console_for_tables

TRUST = "trust=MODULE,...: allow code of these modules that the run's config names"


def run_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Begin the command line of what is asked of a stored run."""
    parser = argparse.ArgumentParser(f"fedraclora {command}", description=description, epilog=TRUST)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--round", type=int, help="of the weights, 0 to the last; else the last")
    return parser


def main(words: Sequence[str]) -> None:
    """Measure what the command line asks for."""
    parser = run_parser("evaluate", __doc__)
    parser.add_argument("--data", default="test", help="a file, or test or validation of the run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args(words)
    run = measuring_run(asked.run, asked.round)
    read = run.read(asked.data)
    metrics = run.evaluate(read, round=asked.round)
    left_out = read.total - len(read.rows)
    if asked.json:
        finite = {n: value if math.isfinite(value) else None for n, value in metrics.items()}
        print(json.dumps({"metrics": finite, "samples": len(read.rows), "left_out": left_out}))
        return
    table = Table(show_header=False, box=None)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if math.isfinite(value) else "not finite")
    table.add_row("samples", f"{len(read.rows)}" + (f", {left_out} left out" if left_out else ""))
    console_for_tables().print(table)
