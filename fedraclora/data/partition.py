"""List the partitions, and divide a data set among clients."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.binding import row_of
from fedraclora.compatibility import Feature
from fedraclora.data.dataset import BY_COLUMN, MOST_NAMED, Clients, DataSet, Division, RowNumbers
from fedraclora.data.fingerprint import fingerprint_of, what_differs
from fedraclora.data.objective import with_labels
from fedraclora.data.partitioners import (
    DIVIDES,
    bootstrap,
    by_partitioner,
    dirichlet,
    fedslop,
    iid,
    pathological,
    shards,
)
from fedraclora.errors import ConfigError, FedRacLoraError, unknown
from fedraclora.imports import check_call, failure_of
from fedraclora.limits import Count, OneOf, limited
from fedraclora.object_registry import is_named

log = logging.getLogger(__name__)
SHOWN = 5  # clients that a warning names
SIZES_SEEN = 1000  # most clients on demand whose sizes go into the summary


@DIVIDES
@BY_COLUMN.where(lambda it: it["column"] == "client")
@limited("partition")
def natural(
    data: DataSet,
    *,
    clients: int | None,
    seed: int,
    column: str = "client",
    least: Count = 1,
    largest: Count | None = None,
) -> list[RowNumbers]:
    """Create one client for each value of a column (a film, a source), in sorted order.

    Args:
        data: The data set.
        clients: None, or the number of values in the column.
        seed: Not used: nothing is drawn.
        column: The column.
        least: Fewest samples of a client; rows of smaller clients are dropped.
        largest: Keep this many clients, those with the most samples; None: all.

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
            f"partition.least={least}: none of the {len(every)} values of {column} has as many "
            f"samples. Lower it to {max(map(len, every))} or less."
        )
    enough = f", {len(parts)} with at least {least} samples" if least > 1 else ""
    if largest is not None:
        if largest > len(parts):
            raise ConfigError(
                f"partition.largest={largest}, but {column} has {len(every)} values{enough}: set "
                f"partition.largest={len(parts)} or less"
            )
        order = np.argsort([-len(part) for part in parts], kind="stable")[:largest]
        parts, enough = [parts[place] for place in np.sort(order)], f", {largest} asked for"
    named = "the column of data.client" if column == "client" else f"partition.column={column}"
    reason = f"{named} has {len(every)} values{enough}"
    _require_number(clients, len(parts), reason)
    return parts


@Feature(
    "partition=given",
    instead="another partition, such as partition=iid",
    avoids={"data without a division": "the data bring no division into clients"},
)
def given(data: DataSet, *, clients: int | None, seed: int) -> Division:
    """Use the data set's own division.

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
            "partition=given: this data set has no division of its own. Choose another, such as "
            "partition=iid."
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


def fitting(data: DataSet) -> str:
    """Choose a partition for a data set: its own division, its client column, or random."""
    if data.parts is not None:
        return "given"
    return "natural" if "client" in data.columns else "iid"


@BY_COLUMN
def auto(data: DataSet, *, clients: int | None, seed: int) -> Division:
    """Divide a data set by its own division, by its client column, or at random.

    Args:
        data: The data set.
        clients: Number of clients; None if the data determine it.
        seed: The seed of the run.

    Returns:
        The result of the partition that `fitting` chooses.
    """
    name = fitting(data)
    if name == "iid" and clients is None:
        raise ConfigError(
            "clients is not set, and no column names the client of each row. Set clients=10, "
            "say, to divide the rows at random, or set data.client to such a column."
        )
    return PARTITIONS[name](data, clients=clients, seed=seed)


PARTITIONS: dict[str, Callable[..., Division]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "pathological": pathological,
    "shards": shards,
    "natural": natural,
    "fedslop": fedslop,
    "given": given,
    "bootstrap": bootstrap,
    "auto": auto,
}


@limited("partition")
def make_partition(
    data: DataSet,
    *,
    name: str,
    clients: Clients | None,
    seed: int,
    empty: Annotated[str, OneOf(("drop", "error"))] = "error",
    **args: Any,
) -> tuple[Division, dict[str, object]]:
    """Divide the training rows of a data set among clients.

    Args:
        data: The data set.
        name: A key of `PARTITIONS`.
        clients: Number of clients; None where the data decide (``natural``, ``given``, ``auto``).
        seed: The seed of the run.
        empty: ``drop`` removes clients without samples, ``error`` refuses them.
        **args: Arguments of the partition.

    Returns:
        Rows of each client (ascending, int64) or clients made on demand, and facts for the
        summary: clients requested, kept and dropped; least, median and largest number of samples
            (of
        a thousand clients, if they are created on demand); dropped rows; a digest of the rows, if
        the user's code divided them; and for natural clients the names by number, and the names
        without rows left.

    Raises:
        ConfigError: If the name or an argument is wrong or the division is impossible, naming
            the key, if the data have their own clients and another division is requested, or if
            clients are empty and ``empty`` is ``error``.
    """
    divide, data = row_of("partition", PARTITIONS, name), with_labels(data)
    own = is_named(name)
    if own and data.parts is not None:
        raise ConfigError(
            f"partition={name} divides a table, but these data are divided already, one entry "
            "for each client. Leave it out."
        )
    if isinstance(divide, type):
        divide, args = partial(by_partitioner, divide(**args)), {}
    elif own:
        check_call(f"partition={name}", divide, data=data, clients=clients, seed=seed, **args)
    if data.on_demand and name not in {"given", "auto"}:
        raise ConfigError(
            f"partition={name} divides a table, but here each client has its own samples. Leave "
            "partition out, or set partition=given."
        )
    if clients is None and name not in {"natural", "given", "auto"} and not own:
        raise ConfigError(f"clients is not set, and partition={name} needs it")
    parts = _dealt(name, divide, data, clients, seed, args, own=own)
    name = fitting(data) if name == "auto" else name
    if own and isinstance(parts, list):
        _require_number(clients, len(parts), f"partition={name} makes {len(parts)}")
    if not isinstance(parts, list):
        sizes = parts.sizes(spread_clients(parts.num_clients, SIZES_SEEN)).numpy()
        return parts, _facts(name, parts.num_clients, 0, sizes)
    nonempty = _nonempty(data, name, parts, empty, peaked="alpha" in args)
    sizes = np.array([len(part) for part in nonempty])
    asked = clients if clients is not None else len(parts)
    facts = _facts(name, asked, len(parts) - len(nonempty), sizes)
    facts |= {"rows_left_out": len(data.train) - int(sizes.sum())}
    facts |= {"rows": _rows_digest(nonempty)} if own else {}
    return nonempty, facts | (_named(data, nonempty, **args) if name == "natural" else {})


def _dealt(
    name: str,
    divide: Callable[..., Any],
    data: DataSet,
    clients: int | None,
    seed: int,
    args: Mapping[str, Any],
    *,
    own: bool,
) -> Division:
    """Divide the rows; a user's function is called twice, as each process calls it."""

    def deal() -> Any:
        found = divide(data, clients=clients, seed=seed, **args)
        return _checked_rows(name, found, len(data.train)) if own else found

    try:
        if not own:
            return cast("Division", deal())
        before = fingerprint_of((data.train, data.columns))
        parts, again = deal(), deal()
    except FedRacLoraError:
        raise
    except Exception as error:
        if own:
            raise ConfigError(f"partition={name}: {failure_of(error, 'calling it')}") from error
        if not isinstance(error, ValueError | IndexError):
            raise  # errors of flwr-datasets: the division does not exist
        settings = "".join(f", partition.{key}={value}" for key, value in args.items())
        takes = inspect.signature(divide).parameters
        ways = ["take fewer clients", "raise partition.alpha" if "alpha" in takes else ""]
        if "min_size" in takes:
            ways.append(
                "leave clients without samples out (partition.min_size=0 partition.empty=drop)"
            )
        raise ConfigError(
            f"partition={name}, clients={clients}{settings} cannot divide {len(data.train)} "
            f"samples ({error}): {', or '.join(filter(None, ways))}"
        ) from error
    if len(parts) != len(again) or not all(map(np.array_equal, parts, again)):
        raise ConfigError(
            f"partition={name} returns other rows when it is called again, but every process of "
            "a run calls it. Draw by its argument seed only (numpy.random.default_rng(seed)), "
            "and keep no state between calls."
        )
    if part := what_differs(before, fingerprint_of((data.train, data.columns))):
        raise ConfigError(
            f"partition={name} changes the data that it divides ({part}): change a copy instead"
        )
    return cast("Division", parts)


def _nonempty(
    data: DataSet, name: str, parts: list[RowNumbers], empty: str, *, peaked: bool
) -> list[RowNumbers]:
    """Drop or refuse clients without samples; arguments as of `make_partition`."""
    empties = [client for client, part in enumerate(parts) if not len(part)]
    shown = ", ".join(map(str, empties[:10])) + (", ..." if len(empties) > 10 else "")
    leaves = f"partition={name} leaves {len(empties)} of {len(parts)} clients without samples"
    if empties and (empty == "error" or len(empties) == len(parts)):
        raise ConfigError(
            f"{leaves} ({shown}): set partition.empty=drop, or take fewer clients"
            + (" or a larger partition.alpha" if peaked else "")
        )
    kept = name in {"given", "natural"} and len(parts) == len(data.tests)
    if data.tests and (not kept or empties):
        why = f"{leaves} ({shown})" if empties else f"partition={name} divides all rows anew"
        raise ConfigError(
            f"{why}, but test samples are assigned to clients by number. Leave partition and "
            "data.labels unset, or leave out the clients' test samples."
        )
    return [part for part in parts if len(part)]


def _checked_rows(name: str, parts: object, count: int) -> list[RowNumbers]:
    """Check the result of a user's function: rows of each client, no row twice."""
    found: list[RowNumbers] = []
    for client, part in enumerate(parts if isinstance(parts, Iterable) else [parts]):
        try:
            rows = np.sort(np.asarray(part))
        except ValueError:  # it is ragged
            rows = np.zeros(1)
        if rows.ndim != 1 or (len(rows) and rows.dtype.kind not in "iu"):
            raise ConfigError(
                f"partition={name} gives {part!r:.100} for client {client}; give an int64 array "
                "of row numbers, [rows], for each client"
            )
        if len(rows) and not 0 <= rows[0] <= rows[-1] < count:
            raise ConfigError(
                f"partition={name} gives client {client} the rows {rows[0]} to {rows[-1]}; the "
                f"data have rows 0 to {count - 1}"
            )
        found.append(rows.astype(np.int64))
    every, times = np.unique(np.concatenate([*found, []]), return_counts=True)
    if bool((times > 1).any()):
        raise ConfigError(
            f"partition={name} gives row {every[times > 1][0]:.0f} twice: assign each row to one "
            "client"
        )
    return found


def _named(
    data: DataSet, parts: Sequence[RowNumbers], column: str = "client", **_: object
) -> dict[str, object]:
    """Name clients by number, and warn about those in the source without any training row."""
    values = data.columns[str(column)]
    firsts = [int(part[0]) for part in parts[:MOST_NAMED]]
    found: dict[str, object] = {"names": values[firsts].tolist()}
    if data.clients is None or not np.array_equal(values, data.columns["client"]):
        return found
    without_rows: list[str] = np.setdiff1d(data.clients, data.columns["client"]).tolist()
    if not without_rows:
        return found
    more = len(without_rows) - SHOWN
    log.warning(
        "%d clients in the data have no training rows left (all were filtered or held out) and "
        "take no part: %s%s",
        len(without_rows),
        ", ".join(map(str, without_rows[:SHOWN])),
        f" and {more} more" if more > 0 else "",
    )
    return found | {
        "clients_without_rows": len(without_rows),
        "without_rows": without_rows[:MOST_NAMED],
    }


def _facts(name: str, asked: int, dropped: int, sizes: npt.NDArray[np.int64]) -> dict[str, object]:
    """Summarize clients by their numbers of samples, of some or all of them."""
    return {
        "partition": name,
        "clients_asked": asked,
        "clients": asked - dropped,
        "clients_dropped": dropped,
        "samples_min": int(sizes.min()),
        "samples_median": float(np.median(sizes)),
        "samples_max": int(sizes.max()),
    }


def _rows_digest(parts: Sequence[RowNumbers]) -> str:
    """Hash the rows of each client, for a run that is resumed, maybe in another process."""
    h = hashlib.sha256(np.array([len(part) for part in parts], np.int64).tobytes())
    for part in parts:
        h.update(np.ascontiguousarray(part, np.int64).tobytes())
    return h.hexdigest()[:16]


def spread_clients(clients: int, most: int) -> torch.Tensor:
    """Return all ids, or ``most`` of them spread evenly, int64.

    Example:
        >>> spread_clients(9, 3)
        tensor([0, 4, 8])
    """
    count = min(clients, most)
    return torch.arange(count) * (clients - 1) // max(1, count - 1)
