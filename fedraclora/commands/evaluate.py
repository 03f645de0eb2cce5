"""``fedraclora evaluate RUN``: the metrics of a finished run on its own samples, or on new ones."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedraclora.config.build import fix_bits, pick_device
from fedraclora.config.run_config import from_plain
from fedraclora.errors import CheckpointError
from fedraclora.run.folder import is_finished, is_running, resume_word
from fedraclora.run.ledger import reached_round
from fedraclora.run.trusted import read_trusted
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.outcome import finished
from fedraclora.strategies.run import Run
from fedraclora.terminal.progress import console_for_tables

TRUST = "trust=MODULE,...: run the code of these modules, which the config of the run names"


def run_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Begin the command line of what is asked of a stored run."""
    parser = argparse.ArgumentParser(f"fedraclora {command}", description=description, epilog=TRUST)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--round", type=int, help="of the weights, 0 to the last; else the last")
    return parser


def stored_run(folder: Path, round_: int | None) -> Run:
    """Read a run from its folder.

    Args:
        folder: The run folder.
        round_: Which of its weights are wanted; None: those of its end, which it must have.

    Raises:
        CheckpointError: If it is no run folder, or not at its end.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"there is no run folder {folder}")
    if (folder / "export.json").is_file():
        raise CheckpointError(f"{folder} is an export of a run: name the folder of the run itself")
    config = from_plain(read_trusted(folder), METHODS, began=True)
    if not is_finished(folder) and round_ is None:
        ways = f"go on with {resume_word(folder)} first"
        if is_running(folder):  # which holds its folder
            ways = f"it is running, at round {reached_round(folder)}: wait for it"
        raise CheckpointError(
            f"{folder}: this run has not come to its end; {ways}, or say with --round which of its "
            "rounds"
        )
    return finished(config, folder)


def measuring_run(folder: Path, round_: int | None) -> Run:
    """Read a run as `stored_run` does, and have torch round as it did in the run."""
    run = stored_run(folder, round_)
    fix_bits(run.settings.engine.threads, pick_device(run.settings.device))
    return run


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
