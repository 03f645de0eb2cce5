"""``fedraclora export RUN``: export the trained model in a format of other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from fedraclora.commands.evaluate import run_parser
from fedraclora.export import FORMATS
from fedraclora.launch import stored_run
from fedraclora.terminal.progress import console_for_tables


def main(words: Sequence[str]) -> None:
    """Export a run, and print the error of each layer."""
    parser = run_parser("export", __doc__)
    parser.add_argument("--format", choices=FORMATS, default="peft")
    parser.add_argument("--rank", type=int, help="peft: the largest rank of a layer")
    no_check = "do not read back what was written: twice as fast for a large model"
    parser.add_argument("--no-check", dest="check", action="store_false", help=no_check)
    parser.add_argument("--out", type=Path, help="a new folder; else RUN/export/FORMAT")
    arguments = parser.parse_args(words)
    run = stored_run(arguments.run, arguments.round)
    out = arguments.out or arguments.run.expanduser() / "export" / arguments.format
    record = run.export(
        out, arguments.format, rank=arguments.rank, round=arguments.round, check=arguments.check
    )
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
