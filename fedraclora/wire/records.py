"""Flower records: a JSON header, vectors of numbers as bytes, and one flat array a message.

Many small arrays are what a Flower deployment is slow at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedraclora.errors import WireError
from fedraclora.protocol.quantised import FULL, decode, encode
from fedraclora.tree import Layout, Tree, to_numpy
from fedraclora.wire.fields import listed, named, parsed, reading, shown, whole

R = TypeVar("R", ArrayRecord, ConfigRecord)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
VECTORS = {
    "clients": np.int64,
    "ranks": np.int64,
    "samples": np.int64,
    "steps": np.int64,
    "losses": np.float64,
    "rounding": np.float64,
}
AXES, LONGEST_AXIS = 8, 2**40  # of a shape that a message names


def header_record(header: object) -> ConfigRecord:
    """Write a header of plain JSON values."""
    return ConfigRecord({"header": json.dumps(header)})


def vector_record(vectors: Mapping[str, torch.Tensor]) -> ConfigRecord:
    """Write short vectors (`VECTORS`) as bytes: a list would be checked number by number."""
    return ConfigRecord({name: to_numpy(vector).tobytes() for name, vector in vectors.items()})


def array_record(flat: torch.Tensor) -> ArrayRecord:
    """Write one array."""
    return tree_record({"flat": flat})


def tree_record(tree: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Write named tensors, one array each."""
    record = ArrayRecord()
    for name, tensor in tree.items():
        record[name] = Array(to_numpy(tensor))
    return record


def read_tree(content: RecordDict, name: str) -> Tree:
    """Read the tensors of the record ``name``; none where it is missing."""
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        return {}
    return {key: torch.from_numpy(array.numpy()) for key, array in record.items()}


def read_header(content: RecordDict) -> dict[str, Any]:
    """Read the header of a message.

    Raises:
        WireError: If it is not one of ours.
    """
    config = content.get("config")
    if not isinstance(config, ConfigRecord) or "arrays" not in content or "chunk" not in content:
        raise WireError(
            f"a message has the records {shown(list(content))}; config, arrays and chunk are wanted"
        )
    return read_json(content, "config")


def record_of(content: RecordDict, name: str, kind: type[R]) -> R:
    """Return the record ``name`` of a message.

    Raises:
        WireError: If there is none, or one of another kind.
    """
    record = content.get(name)
    if not isinstance(record, kind):
        raise WireError(
            f"a message has the records {shown(list(content))}; {kind.__name__} {name} is wanted"
        )
    return record


def read_json(content: RecordDict, name: str) -> dict[str, Any]:
    """Read the header in the record ``name``.

    Raises:
        WireError: If it is missing, or no JSON object.
    """
    text = record_of(content, name, ConfigRecord).get("header")
    return parsed(text, f"the header in the record {name}")


def round_of(content: RecordDict) -> int:
    """Read the round of a message."""
    return whole(read_header(content).get("round"), "its round")


def clients_of(content: RecordDict) -> list[int]:
    """Read the ids of the clients of a message.

    Raises:
        WireError: If it names none.
    """
    vectors = read_vectors(content)
    if "clients" not in vectors:
        raise WireError("a message does not say which clients it is for")
    ids: list[int] = vectors["clients"].tolist()
    return ids


def read_array(content: RecordDict, name: str, key: str = "flat") -> torch.Tensor:
    """Read an array of the record ``name``; the tensor may lie anywhere in memory.

    Args:
        content: The message.
        name: Of the record.
        key: Of the array in it.

    Raises:
        WireError: If it is missing, or its bytes are not those of the shape that it names.
    """
    record = record_of(content, name, ArrayRecord)
    with reading(f"the array of the record {name}"):
        array = record[key]
        _check_bytes(array.data)
        return torch.from_numpy(array.numpy())


def packed_numbers(numbers: torch.Tensor, layout: Layout, kind: str) -> torch.Tensor:
    """Pack numbers [..., P] as they travel."""
    if kind == FULL:
        return numbers
    if numbers.dim() == 1:
        return encode(numbers, layout.sizes, kind)
    return torch.stack([encode(row, layout.sizes, kind) for row in numbers])


def read_numbers(
    content: RecordDict, record: str, axes: int, layout: Layout, kind: str
) -> torch.Tensor:
    """Read an array of the numbers that travel, [k, P] or [P]."""
    found = read_array(content, record)
    if kind != FULL and axes == 1:
        found = decode(found, layout.sizes, kind)
    elif kind != FULL:
        found = torch.stack([decode(row, layout.sizes, kind) for row in found])
    if found.dim() != axes or found.dtype not in DTYPES.values():
        raise WireError(
            f"the record {record} has the shape {tuple(found.shape)} and the type {found.dtype}; "
            f"{axes} axes and one of {[*DTYPES]} are wanted"
        )
    return found


def _check_bytes(data: bytes) -> None:
    """Reject bytes that are no array, or are not as many as it says: before memory is taken."""
    stream = BytesIO(data)
    formats = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = formats[np.lib.format.read_magic(stream)](stream)
    size, came = prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if size != came:
        raise WireError(
            f"an array of shape {shown(shape)} and type {dtype} takes {size} bytes, but {came} came"
        )


def read_vectors(content: RecordDict) -> Tree:
    """Read the vectors of a message.

    Raises:
        WireError: If they are not whole.
    """
    chunk = record_of(content, "chunk", ConfigRecord)
    with reading("a vector of the record chunk"):
        return {
            name: torch.from_numpy(np.frombuffer(chunk[name], kind).copy())  # type: ignore[arg-type]
            for name, kind in VECTORS.items()
            if name in chunk
        }


def read_first(content: RecordDict) -> int:
    """Read the place of a message's first client in the cohort."""
    first = record_of(content, "chunk", ConfigRecord).get("first")
    return whole(first, "the place of its first client")


def read_layout(shapes: object, what: str) -> Layout:
    """Read a layout back from JSON.

    Args:
        shapes: Pairs of a name and a shape.
        what: It is, to begin the sentence.

    Raises:
        WireError: If it is none, or names a tensor twice.
    """
    found = []
    for pair in listed(shapes, what):
        if not isinstance(pair, list) or len(pair) != 2:
            raise WireError(f"{what} holds {shown(pair)}; a name and a shape are wanted")
        found.append((named(pair[0], what), read_shape(pair[1], what)))
    if len(dict(found)) != len(found):
        raise WireError(f"{what} names a tensor twice")
    return Layout(tuple(found))


def read_shape(sizes: object, what: str) -> tuple[int, ...]:
    """Read a shape back from JSON.

    Raises:
        WireError: If it is none.
    """
    return tuple(whole(size, what, most=LONGEST_AXIS) for size in listed(sizes, what, AXES))
