"""Updates of base weights in train messages: a JSON header, and all numbers as one array."""

from __future__ import annotations

from math import prod

import torch
from flwr.app import RecordDict

from fedraclora.errors import WireError
from fedraclora.tree import Tree
from fedraclora.weights.update import WeightUpdate, read_update, update_tensors
from fedraclora.wire.fields import exactly, listed, named, reading, shown, whole
from fedraclora.wire.records import (
    DTYPES,
    array_record,
    header_record,
    read_array,
    read_json,
    read_shape,
)

FIELDS = frozenset({"version", "mark", "held", "links", "values", "tensors"})
KINDS = DTYPES | {"bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS |= {k: getattr(torch, k) for k in ("int8", "int16", "int32", "int64", "uint8", "bool")}
HEADER, NUMBERS = "parcel", "parcel-numbers"  # records of the message


def add_weight_update(content: RecordDict, update: WeightUpdate) -> None:
    """Write an update into a message, in the place of one that is there."""
    tensors, meta = update_tensors(update)
    described = [[n, str(t.dtype)[6:], t.shape] for n, t in tensors.items()]
    # As bytes: one array for numbers of any kinds.
    raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()]
    content[HEADER] = header_record(meta | {"tensors": described})
    content[NUMBERS] = array_record(torch.cat([torch.zeros(0, dtype=torch.uint8), *raw]))


def read_weight_update(content: RecordDict) -> WeightUpdate:
    """Read the update of a message.

    Raises:
        WireError: If it has none, or one that is damaged.
    """
    with reading("an update of base weights"):
        header = read_json(content, HEADER)
        exactly(header, FIELDS, "the header of an update")
        whole(header["version"], "the version of an update")
        if header["held"] is not None:
            whole(header["held"], "held", -1)
        for version, _ in listed(header["links"], "links"):
            whole(version, "the version of a link")
        tensors = _tensors(header["tensors"], read_array(content, NUMBERS))
        return read_update(tensors, header)


def _tensors(described: object, raw: torch.Tensor) -> Tree:
    """Cut the bytes of an update into tensors."""
    if raw.dim() != 1 or raw.dtype != torch.uint8:
        raise WireError(
            f"a weight update has the shape {tuple(raw.shape)} and the type {raw.dtype}; a row of "
            "bytes is wanted"
        )
    found: Tree = {}
    start = 0
    for key, kind, shape in listed(described, "the tensors of an update"):
        if kind not in KINDS:
            raise WireError(
                f"a tensor of a weight update is of the kind {shown(kind)}, which is not known"
            )
        sizes, dtype = read_shape(shape, f"the shape of {shown(key)}"), KINDS[kind]
        size = prod(sizes) * dtype.itemsize
        if size > len(raw) - start:
            raise WireError(
                f"the tensor {shown(key)} of a weight update takes {size} bytes, but only "
                f"{len(raw) - start} are left"
            )
        # Copied into memory of torch's own: matrix products round by alignment.
        blank = torch.empty(sizes, dtype=dtype)
        blank.reshape(-1).view(torch.uint8).copy_(raw[start : start + size])
        found[named(key, "a tensor of an update")] = blank
        start += size
    if start != len(raw):
        raise WireError(f"a weight update has {len(raw) - start} bytes more than its tensors take")
    return found
