"""Where samples of other people's lie: in ``.npz`` files, or with a function of theirs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from fedraclora.data.fit import gathered
from fedraclora.data.locate import user_path
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError
from fedraclora.imports import call_function, is_function

TARGET = "target"
ALONE = "train.npz"  # the file of a folder that is one client's


def counted(samples: str | None, clients: int | None) -> int:
    """Return the number of clients, which the files of a folder may determine.

    Raises:
        ConfigError: If nothing tells it.
        DataError: If the numbers of the files leave one out.
    """
    if clients is not None:
        return clients
    if samples is None or is_function(samples):
        raise ConfigError(
            "clients is not set: say for how many clients there are samples, for example clients=3"
        )
    folder = _folder(samples)
    numbers = _numbers(folder)
    if not numbers:
        if (folder / ALONE).is_file():
            return 1
        raise DataError(
            f"data.samples={samples}: there is no file 0.npz, 1.npz, ... in this folder"
        )
    missing = sorted({*range(max(numbers) + 1)} - numbers)
    if missing:
        raise DataError(
            f"data.samples={samples}: there is {max(numbers)}.npz but no {missing[0]}.npz; clients "
            "are numbered from 0 without a gap"
        )
    return len(numbers)


def _folder(samples: str) -> Path:
    folder = user_path("data.samples", samples)
    if folder.is_file():
        raise DataError(
            f"data.samples={samples} is a file; a folder with 0.npz, 1.npz, ... or module:function "
            "is wanted. A file that is to be divided among clients is for data=table (CSV, "
            "Parquet) or data=arrays (.npz)"
        )
    return folder


def _numbers(folder: Path) -> set[int]:
    return {int(file.stem) for file in folder.glob("*.npz") if file.stem.isdecimal()}


def source_label(source: str | None, client: int | None = None) -> str:
    """Name a source in messages."""
    if client is None:
        return f"data.test={source}"
    return f"client {client} (data.samples={source})"


def read_own(
    source: str, client: int, *, alone: bool = False, arguments: Mapping[str, object] | None = None
) -> Samples:
    """Read the samples of one client.

    Args:
        source: ``package.module:function``, which is called with the client's id; or a folder with
            ``<id>.npz``, or ``train.npz`` where it has one client's alone.
        client: The id.
        alone: Whether no other client can mean the same folder.
        arguments: Further ones of the function, by name.

    Raises:
        DataError: If they are missing.
    """
    where = source_label(source, client)
    if is_function(source):
        return gathered(call_function("data.samples", source, client, **(arguments or {})), where)
    folder = _folder(source)
    named, only = folder / f"{client}.npz", folder / ALONE
    if named.is_file():
        return read_npz(named, where)
    if not only.is_file():
        raise DataError(f"{where} has no samples: neither {named} nor {only} is there")
    if not alone or _numbers(folder):
        raise DataError(
            f"{where} has no samples: {named} is not there, and {only} is one client's alone; with "
            "several clients each has its own file, 0.npz, 1.npz, ..."
        )
    return read_npz(only, where)


def read_table(source: str, arguments: Mapping[str, object] | None = None) -> Samples:
    """Read samples from a ``.npz`` file, or from a function of these arguments."""
    if is_function(source):
        found = call_function("data.test", source, **(arguments or {}))
        return gathered(found, source_label(source))
    path = user_path("data.test", source)
    if not path.is_file():
        raise DataError(f"data.test: there is no file {path}")
    return read_npz(path, source_label(source))


def read_npz(path: Path, where: str) -> Samples:
    """Read the arrays of a ``.npz`` file: the target, and the inputs by their names.

    Raises:
        DataError: If it cannot be read, or has no target or no inputs.
    """
    if path.suffix.lower() != ".npz":
        raise DataError(
            f"{where}: {path.name} is no .npz file; write one with numpy.savez(path, x=..., "
            "target=...), or name a function that reads it. Tables (CSV, Parquet) that are to be "
            "divided among clients are for data=table"
        )
    arrays = read_arrays(path)
    if TARGET not in arrays or len(arrays) < 2:
        raise DataError(
            f"{where}: {path} holds {[*arrays]}; {TARGET} is wanted, and x (or the inputs of the "
            "model by name)"
        )
    target = arrays.pop(TARGET)
    return gathered((arrays, target), where)


# What numpy and zipfile raise where a file is damaged.
UNREADABLE = (OSError, ValueError, TypeError, EOFError, AttributeError, BadZipFile, zlib.error)


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read every array of a ``.npz`` file.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        # Pickles could run code; numpy does not close a damaged file that it has opened itself.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}; is the file whole?") from error
