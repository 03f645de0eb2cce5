"""``fedraclora compact RUN``: fold links of a run's chain, for fewer files and bytes.

The run goes on as before, and ends with the same weights to the bit. `export`, `load_weights` and
`start=RUN` find the rounds that were kept; the others are gone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.table import Table

from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.experiments.progress import console_for_tables
from fedraclora.experiments.status import reported
from fedraclora.run.compact import compact
from fedraclora.run.folder import read_config


@reported
def main() -> int:
    """Compact the run that is named."""
    parser = argparse.ArgumentParser("fedraclora compact", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run that is not running")
    every = "keep each N-th round (100), beside the first and the last checkpoint"
    parser.add_argument("--every", type=int, default=100, metavar="N", help=every)
    asked = parser.parse_args()
    folder = asked.run.expanduser()
    if asked.every < 1:
        raise ConfigError(f"--every is {asked.every}; a number of rounds from 1 on is wanted")
    if not folder.is_dir():
        raise CheckpointError(f"there is no run folder {folder}")
    read_config(folder)
    done = compact(folder, asked.every)
    table = Table("chain", "bytes", "files", box=None)
    for when, (size, files) in (("before", done.before), ("after", done.after)):
        table.add_row(when, f"{size:,}", f"{files:,}")
    console_for_tables().print(table)
    print(f"rounds that can be exported: {done.rounds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
