"""``fedraclora predict RUN --data FILE``: predict each row of a file with a finished run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedraclora.commands.evaluate import run_parser
from fedraclora.errors import ConfigError
from fedraclora.launch import measuring_run
from fedraclora.run.trusted import refuse_linked
from fedraclora.weights.files import write_text

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = (".csv", ".jsonl")


def main(words: Sequence[str]) -> None:
    """Predict the rows of a file, and print or write the predictions."""
    parser = run_parser("predict", __doc__)
    parser.add_argument("--data", required=True, help="a file, or test or validation of the run")
    parser.add_argument("--out", type=Path, help="a new .csv or .jsonl; else they are printed")
    parser.add_argument("--json", action="store_true", help="print JSON lines, not CSV")
    arguments = parser.parse_args(words)
    out: Path | None = None if arguments.out is None else arguments.out.expanduser()
    if out is not None:
        _check_place(out)
    frame = measuring_run(arguments.run, arguments.round).predict(
        arguments.data, round=arguments.round
    )
    lines = arguments.json if out is None else out.suffix == KINDS[1]
    text = _lines(frame) if lines else frame.map(_cell).to_csv(index=False)
    if out is None:
        print(text, end="")
    else:
        write_text(out, text)
    if missing := int(frame.isna().all(axis=1).sum()):
        print(
            f"note: {missing} of {len(frame)} rows have no answer: the run's data settings "
            "leave such rows out",
            file=sys.stderr,
        )


def _check_place(out: Path) -> None:
    """Check before the predictions are computed that they can be written."""
    if out.suffix not in KINDS:
        raise ConfigError(f"--out {out}: the name must end in {' or '.join(KINDS)}")
    if out.exists():
        raise ConfigError(f"--out {out} exists already: name a new file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist")
    refuse_linked(out)


def _lines(frame: DataFrame) -> str:
    """Write a frame as JSON lines, with null for missing predictions."""
    rows = [
        {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _cell(value: object) -> object:
    """Convert a cell for CSV: lists to JSON, integers to text (pandas would write 1.0 for 1)."""
    if isinstance(value, list):
        return json.dumps(value)
    return str(value) if isinstance(value, int) else value
