"""Flower records: a JSON header, vectors of numbers as bytes, and one flat array a message.

Many small arrays are what a Flower deployment is slow at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedraclora.errors import WireError
from fedraclora.tree import Layout, Tree, to_numpy

DTYPES = {"float32": torch.float32, "float64": torch.float64}
VECTORS = {
    "clients": np.int64,
    "ranks": np.int64,
    "samples": np.int64,
    "steps": np.int64,
    "losses": np.float64,
}


def header_record(header: object) -> ConfigRecord:
    """Write a header of plain JSON values."""
    return ConfigRecord({"header": json.dumps(header)})


def vector_record(vectors: Mapping[str, torch.Tensor]) -> ConfigRecord:
    """Write short vectors (`VECTORS`) as bytes: a list would be checked number by number."""
    return ConfigRecord({name: to_numpy(vector).tobytes() for name, vector in vectors.items()})


def array_record(flat: torch.Tensor) -> ArrayRecord:
    """Write one array."""
    record = ArrayRecord()
    record["flat"] = Array(to_numpy(flat))
    return record


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
            f"a message holds {list(content)}; wanted the records config, arrays and chunk"
        )
    return read_json(content, "config")


def read_json(content: RecordDict, name: str) -> dict[str, Any]:
    """Read the header in the record ``name``.

    Raises:
        WireError: If it is missing.
    """
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise WireError(f"a message holds {list(content)}; a record {name} is wanted")
    header: dict[str, Any] = json.loads(str(record["header"]))
    return header


def round_of(content: RecordDict) -> int:
    """Read the round of a message."""
    return int(read_header(content)["round"])


def clients_of(content: RecordDict) -> list[int]:
    """Read the ids of the clients of a message."""
    ids: list[int] = read_vectors(content)["clients"].tolist()
    return ids


def read_array(content: RecordDict, name: str) -> torch.Tensor:
    """Read the array of the record ``name``; the tensor may lie anywhere in memory."""
    record = content.get(name)
    if not isinstance(record, ArrayRecord):
        raise WireError(f"a message holds {list(content)}; an array record {name} is wanted")
    return torch.from_numpy(record["flat"].numpy())


def read_vectors(content: RecordDict) -> Tree:
    """Read the vectors of a message."""
    chunk = content["chunk"]
    return {
        name: torch.from_numpy(np.frombuffer(chunk[name], kind).copy())  # type: ignore[arg-type]
        for name, kind in VECTORS.items()
        if name in chunk
    }


def read_layout(shapes: list[list[Any]]) -> Layout:
    """Read a layout back from JSON."""
    return Layout(tuple((name, tuple(shape)) for name, shape in shapes))
