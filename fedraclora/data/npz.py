"""Read ``.npz`` files, and find their arrays by usual names."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from fedraclora.data.locate import unread
from fedraclora.errors import DataError

AnyArray = npt.NDArray[Any]
SPELLINGS = {
    "x": ("x", "X", "images", "x_train", "train_images"),
    "target": ("target", "y", "Y", "labels", "y_train", "train_labels"),
    "test_x": ("x_test", "test_x", "test_images"),
    "test_target": ("target_test", "y_test", "test_target", "test_labels"),
    "client": ("client",),
}
# Errors of numpy and zipfile for damaged files.
BROKEN_FILE = (OSError, ValueError, TypeError, EOFError, AttributeError, BadZipFile, zlib.error)


def read_arrays(path: Path, do: str, where: object = "data") -> dict[str, AnyArray]:
    """Read every array of a ``.npz`` file; ``do`` is the advice for other files.

    Raises:
        DataError: If it is missing, no ``.npz`` file, or damaged.
    """
    if not path.is_file():
        raise DataError(f"{where}: there is no file {path}")
    if path.suffix.lower() != ".npz":
        raise DataError(f"{where}: {path.name} is not an .npz file; {do}")
    try:
        # Pickles could run code; numpy does not close a damaged file that it has opened itself.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except BROKEN_FILE as error:
        raise unread(path, error) from error


def taken(arrays: dict[str, AnyArray], path: Path) -> dict[str, AnyArray]:
    """Find the arrays with usual names in a file, and give them standard names.

    Raises:
        DataError: If two could have one name.
    """
    found: dict[str, AnyArray] = {}
    for name, spellings in SPELLINGS.items():
        there = [spelling for spelling in spellings if spelling in arrays]
        if len(there) > 1:
            raise DataError(f"{path}: each of the arrays {there} could be {name}: keep one of them")
        found |= {name: arrays.pop(there[0])} if there else {}
    return found
