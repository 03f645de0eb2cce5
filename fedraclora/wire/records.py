"""A message in plain: a JSON header, vectors of numbers as bytes, and one flat array.

Many small arrays are what a Flower deployment is slow at. What of Flower they are written as is
known to `fedraclora.engines.records` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from typing_extensions import override

from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.quantised import FULL, decode, encode
from fedraclora.tree import Layout, Tree, to_numpy
from fedraclora.wire.exchange import DTYPES
from fedraclora.wire.fields import listed, named, parsed, reading, shown, whole


class Fields(dict[str, Any]):
    """A record of plain values."""


class Tensors(dict[str, torch.Tensor]):
    """A record of tensors; it goes to another process as arrays, of which torch can pickle all."""

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, ({name: to_numpy(tensor) for name, tensor in self.items()},)


def _unpickled(arrays: Mapping[str, Any]) -> Tensors:
    # Copied: what lies in memory that Ray shares is not to be written to.
    return Tensors({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


R = TypeVar("R", Fields, Tensors)
Content = dict[str, Fields | Tensors]
VECTORS = {
    "clients": np.int64,
    "places": np.int64,
    "ranks": np.int64,
    "samples": np.int64,
    "sizes": np.int64,
    "steps": np.int64,
    "losses": np.float64,
    "rounding": np.float64,
}
AXES, LONGEST_AXIS = 8, 2**40  # of a shape that a message names


def header_record(header: object) -> Fields:
    """Write a header of plain JSON values."""
    return Fields({"header": json.dumps(header)})


def vector_record(vectors: Mapping[str, torch.Tensor]) -> Fields:
    """Write short vectors (`VECTORS`) as bytes: a list would be checked number by number."""
    return Fields({name: to_numpy(vector).tobytes() for name, vector in vectors.items()})


def array_record(flat: torch.Tensor) -> Tensors:
    """Write one array."""
    return tree_record({"flat": flat})


def tree_record(tree: Mapping[str, torch.Tensor]) -> Tensors:
    """Write named tensors, one array each."""
    return Tensors({name: tensor.detach().cpu() for name, tensor in tree.items()})


def read_tree(content: Content, name: str) -> Tree:
    """Read the tensors of the record ``name``; none where it is missing."""
    record = content.get(name)
    return dict(record) if isinstance(record, Tensors) else {}


def message_header(content: Content) -> dict[str, Any]:
    """Read the header of a message.

    Raises:
        WireError: If it is not one of ours.
    """
    config = content.get("config")
    if not isinstance(config, Fields) or "arrays" not in content or "chunk" not in content:
        raise WireError(
            f"a message has the records {shown(list(content))}; config, arrays and chunk are wanted"
        )
    return read_json(content, "config")


def record_of(content: Content, name: str, kind: type[R]) -> R:
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


def read_json(content: Content, name: str) -> dict[str, Any]:
    """Read the header in the record ``name``.

    Raises:
        WireError: If it is missing, or no JSON object.
    """
    text = record_of(content, name, Fields).get("header")
    return parsed(text, f"the header in the record {name}")


def round_of(content: Content) -> int:
    """Read the round of a message."""
    return whole(message_header(content).get("round"), "its round")


def clients_of(content: Content) -> list[int]:
    """Read the ids of the clients of a message.

    Raises:
        WireError: If it names none.
    """
    vectors = read_vectors(content)
    if "clients" not in vectors:
        raise WireError("a message does not say which clients it is for")
    ids: list[int] = vectors["clients"].tolist()
    return ids


@contextmanager
def of_message(content: Content) -> Iterator[None]:
    """Name round and clients of a message in the error of what is read of it."""
    try:
        yield
    except WireError as error:
        who = f"round {round_of(content)}, clients {shown(clients_of(content))}"
        raise WireError(f"{who}: {error}") from error


def read_array(content: Content, name: str, key: str = "flat") -> torch.Tensor:
    """Read an array of the record ``name``; the tensor may lie anywhere in memory.

    Args:
        content: The message.
        name: Of the record.
        key: Of the array in it.

    Raises:
        WireError: If it is missing.
    """
    record = record_of(content, name, Tensors)
    with reading(f"the array of the record {name}"):
        return record[key]


def packed_numbers(
    numbers: torch.Tensor, layout: Layout, kind: str, coding: str = NONE
) -> torch.Tensor:
    """Pack numbers [..., P] as they travel."""
    return numbers if kind == FULL else encode(numbers, layout.sizes, kind, coding=coding)


def read_numbers(
    content: Content, record: str, axes: int, layout: Layout, kind: str
) -> torch.Tensor:
    """Read an array of the numbers that travel, [k, P] or [P]."""
    found = read_array(content, record)
    if kind != FULL:
        found = decode(found, layout.sizes, kind, axes)
    if found.dim() != axes or found.dtype not in DTYPES.values():
        raise WireError(
            f"the record {record} has the shape {tuple(found.shape)} and the type {found.dtype}; "
            f"{axes} axes and one of {[*DTYPES]} are wanted"
        )
    return found


def read_vectors(content: Content) -> Tree:
    """Read the vectors of a message.

    Raises:
        WireError: If they are not whole.
    """
    chunk = record_of(content, "chunk", Fields)
    with reading("a vector of the record chunk"):
        return {
            name: torch.from_numpy(np.frombuffer(chunk[name], kind).copy())
            for name, kind in VECTORS.items()
            if name in chunk
        }


def read_first(content: Content) -> int:
    """Read the place of a message's first client in the cohort."""
    first = record_of(content, "chunk", Fields).get("first")
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
