"""``fedraclora export RUN``: the trained model of a run, in a form that other libraries read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedraclora.commands.evaluate import run_parser
from fedraclora.export import FORMATS
from fedraclora.launch import stored_run
from fedraclora.terminal.progress import console_for_tables


def main(words: Sequence[str]) -> None:
    """Export what the command line asks for."""
    parser = run_parser("export", __doc__)
    parser.add_argument("--format", choices=FORMATS, default="peft")
    parser.add_argument("--rank", type=int, help="peft: the largest rank of a layer")
    quick = "do not read back what was written: twice as fast for a large model"
    parser.add_argument("--no-check", dest="check", action="store_false", help=quick)
    parser.add_argument("--out", type=Path, help="a new folder; else RUN/export/FORMAT")
    asked = parser.parse_args(words)
    run = stored_run(asked.run, asked.round)
    out = asked.out or asked.run.expanduser() / "export" / asked.format
    record = run.export(out, asked.format, rank=asked.rank, round=asked.round, check=asked.check)
    table = Table("layer", "rank", "rank of the change", "relative error", box=None)
    layers = record.get("layers")
    for name, layer in layers.items() if isinstance(layers, dict) else ():
        error = f"{layer['relative_error']:.2e}"
        table.add_row(name, str(layer["rank"]), str(layer["rank_of_change"]), error)
    if table.row_count:
        console_for_tables().print(table)
    for sentence in record.get("warnings", ()):  # type: ignore[attr-defined]
        print(f"note: {sentence}")
    print(f"written to {out}")
