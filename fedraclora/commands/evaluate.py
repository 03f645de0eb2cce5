"""``fedraclora evaluate RUN``: measure a finished run on its own samples, or on new ones."""

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
    """Create the parser of a command that reads a stored run."""
    parser = argparse.ArgumentParser(f"fedraclora {command}", description=description, epilog=TRUST)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--round", type=int, help="of the weights, 0 to the last; else the last")
    return parser


def main(words: Sequence[str]) -> None:
    """Print the metrics of a run."""
    parser = run_parser("evaluate", __doc__)
    parser.add_argument("--data", default="test", help="a file, or test or validation of the run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(words)
    run = measuring_run(arguments.run, arguments.round)
    samples = run.read(arguments.data)
    metrics = run.evaluate(samples, round=arguments.round)
    left_out = samples.total - len(samples.rows)
    if arguments.json:
        finite = {n: value if math.isfinite(value) else None for n, value in metrics.items()}
        print(json.dumps({"metrics": finite, "samples": len(samples.rows), "left_out": left_out}))
        return
    table = Table(show_header=False, box=None)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if math.isfinite(value) else "not finite")
    table.add_row(
        "samples", f"{len(samples.rows)}" + (f", {left_out} left out" if left_out else "")
    )
    console_for_tables().print(table)
