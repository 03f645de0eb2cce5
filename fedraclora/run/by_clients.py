"""What single clients measured, round by round: a table in memory, and ``clients.parquet``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedraclora.errors import CheckpointError
from fedraclora.weights.files import ADVICE, replacing

CLIENTS_FILE = "clients.parquet"
Columns = Mapping[str, Any]  # by name, one value for each client


class ByClients:
    """The parts of the table, one for each measurement.

    Attributes:
        parts: Columns by name: ``round``, ``client``, ``samples``, ``steps``, ``when`` (before or
            after local training), and a metric each.
    """

    def __init__(self) -> None:
        self.parts: list[Columns] = []

    @property
    def columns(self) -> Columns:
        """The whole table; a metric that a part lacks is NaN there."""
        names = dict.fromkeys(name for part in self.parts for name in part)

        def of(part: Columns, name: str) -> Any:
            return part[name] if name in part else np.full(len(part["round"]), np.nan)

        return {name: np.concatenate([of(part, name) for part in self.parts]) for name in names}

    def save(self, folder: Path) -> None:
        """Write the table, if there is any."""
        if not self.parts:
            return
        from pyarrow import parquet, table

        with replacing(folder / CLIENTS_FILE) as path:
            parquet.write_table(table(self.columns), path)

    def restore(self, folder: Path, round_: int) -> None:
        """Read the table back, up to a round."""
        found = read_clients(folder)
        kept = {name: column[found["round"] <= round_] for name, column in found.items()}
        self.parts = [kept] if kept else []


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
