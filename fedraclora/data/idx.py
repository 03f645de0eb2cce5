"""IDX files, the format of MNIST and its kin."""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedraclora.errors import DataError

TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_packed(path: Path) -> bytes:
    """Read a file, unpacked where its name ends in .gz.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; is the file whole?") from error


def parse_idx(data: bytes, name: str) -> npt.NDArray[Any]:
    """Read the bytes of an IDX file: two zeros, a type, the number of axes, their sizes, numbers.

    Args:
        data: The bytes.
        name: For messages.

    Returns:
        An array of the shape and type that the file states.

    Raises:
        DataError: If it is no IDX file, or not whole.
    """
    kind = TYPES.get(data[2]) if len(data) > 4 and data[:2] == b"\0\0" else None
    axes = data[3] if kind else 0
    if kind is None or not axes or len(data) < 4 + 4 * axes:
        raise DataError(f"{name} is no IDX file (it does not begin as one)")
    shape = tuple(np.frombuffer(data, ">i4", count=axes, offset=4).tolist())
    size = 4 + 4 * axes + prod(shape) * np.dtype(kind).itemsize
    if min(shape) < 0 or len(data) != size:
        raise DataError(f"{name} is not whole: {len(data)} bytes for shape {shape}, not {size}")
    found = np.frombuffer(data, kind, offset=4 + 4 * axes).reshape(shape)
    return found.astype(np.dtype(kind).newbyteorder("="))
