"""What single clients measured, round by round: a table in memory, and ``clients.parquet``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedraclora.errors import CheckpointError
from fedraclora.weights.files import ADVICE, replacing

CLIENTS_FILE = "clients.parquet"
Columns = Mapping[str, Any]  # by name, one value for each client


def together(parts: Sequence[Columns]) -> Columns:
    """Join the parts of the table, one for each measurement.

    Columns are ``round``, ``client``, ``samples``, ``steps``, ``when`` (before or after local
    training), and a metric each; a metric that a part lacks is NaN there.
    """
    names = dict.fromkeys(name for part in parts for name in part)

    def of(part: Columns, name: str) -> Any:
        return part[name] if name in part else np.full(len(part["round"]), np.nan)

    return {name: np.concatenate([of(part, name) for part in parts]) for name in names}


def write_clients(folder: Path, parts: Sequence[Columns]) -> None:
    """Write the table, if there is any."""
    if not parts:
        return
    from pyarrow import parquet, table

    with replacing(folder / CLIENTS_FILE) as path:
        parquet.write_table(table(together(parts)), path)


def read_clients(folder: Path) -> Columns:
    """Read the table of a run folder; no column where no client has measured.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = folder / CLIENTS_FILE
    if not path.is_file():
        return {}
    from pyarrow import ArrowException, parquet

    try:
        found = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {ADVICE}") from error
    return {name: found[name].to_numpy() for name in found.column_names}
