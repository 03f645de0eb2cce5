"""Divisions that the data bring: an owner of every row, or rows of every client."""

from __future__ import annotations

import numpy as np

from fedraclora.data.dataset import DataSet, Division, Rows
from fedraclora.errors import ConfigError, unknown
from fedraclora.limits import Count, limited


@limited("partition")
def natural(
    data: DataSet, *, clients: int | None, seed: int, column: str = "client", least: Count = 1
) -> list[Rows]:
    """Make one client of each value of a column (a film, a source), in sorted order.

    Args:
        data: The data set.
        clients: None, or the number of values that are found.
        seed: Not used: nothing is drawn.
        column: The column.
        least: Samples that a client has at least; the rows of smaller ones are left out.

    Returns:
        Rows of each client.
    """
    del seed
    if str(column) not in data.columns:
        error = unknown("column", column, data.columns)
        raise ConfigError(f"partition.column: {error} (set data.client for a natural client)")
    _, owner, sizes = np.unique(data.columns[str(column)], return_inverse=True, return_counts=True)
    every = np.split(np.argsort(owner, kind="stable"), np.cumsum(sizes)[:-1])
    parts = [part for part in every if len(part) >= least]
    if not parts:
        raise ConfigError(
            f"partition.least={least}: none of the {len(every)} values of {column} has so many "
            f"samples; the largest has {max(map(len, every))}"
        )
    enough = f", {len(parts)} with at least {least} samples" if least > 1 else ""
    named = "the column of data.client" if column == "client" else f"partition.column={column}"
    reason = f"{named} has {len(every)} values{enough}"
    _require_number(clients, len(parts), reason)
    return parts


def given(data: DataSet, *, clients: int | None, seed: int) -> Division:
    """Take the division that the data set brings.

    Args:
        data: The data set.
        clients: None, or the number of clients of the data set.
        seed: Not used: nothing is drawn.

    Returns:
        Rows of each client, or clients that are made on demand.
    """
    del seed
    if data.parts is None:
        raise ConfigError(
            "partition=given: this data set brings no division of its own; choose another, such "
            "as partition=iid"
        )
    parts = data.parts
    if isinstance(parts, list):
        parts = [np.sort(part) for part in parts]
    found = len(parts) if isinstance(parts, list) else parts.num_clients
    _require_number(clients, found, f"the data set has {found} clients")
    return parts


def _require_number(clients: int | None, found: int, why: str) -> None:
    if clients is not None and clients != found:
        raise ConfigError(f"clients={clients}, but {why}: set clients=null or clients={found}")
