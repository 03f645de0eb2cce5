"""Parcels of base weights in train messages: a JSON header, and all numbers as one array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from fedraclora.chain import link_tensors, read_link
from fedraclora.parcel import Parcel
from fedraclora.tree import Tree
from fedraclora.wire.records import header_record, read_array, read_json

HEADER, NUMBERS = "parcel", "parcel-numbers"  # records of the message


def add_parcel(content: RecordDict, parcel: Parcel) -> None:
    """Write a parcel into a message, in the place of one that is there."""
    tensors: Tree = {}
    links = []
    for version, link in parcel.links:
        found, meta = link_tensors(link)
        tensors |= {f"{version}|{name}": t for name, t in found.items()}
        links.append([version, meta])
    tensors |= {f"dense|{name}": t for name, t in parcel.dense.items()}
    header = {
        "version": parcel.version,
        "mark": str(parcel.mark),
        "held": parcel.held,
        "links": links,
        "tensors": [[n, str(t.dtype)[6:], t.shape] for n, t in tensors.items()],
    }
    # As bytes: one array for numbers of any kinds.
    raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()]
    record = ArrayRecord()
    record["flat"] = Array(torch.cat(raw).numpy() if raw else np.zeros(0, np.uint8))
    content[HEADER], content[NUMBERS] = header_record(header), record


def read_parcel(content: RecordDict) -> Parcel:
    """Read the parcel of a message.

    Raises:
        WireError: If it has none.
    """
    header: dict[str, Any] = read_json(content, HEADER)
    raw, start, tensors = read_array(content, NUMBERS), 0, {}
    for name, dtype, shape in header["tensors"]:
        blank = torch.empty(shape, dtype=getattr(torch, dtype))
        size = blank.numel() * blank.element_size()
        # Copied into memory of torch's own: matrix products round by alignment.
        blank.reshape(-1).view(torch.uint8).copy_(raw[start : start + size])
        tensors[name], start = blank, start + size

    def part(prefix: str) -> Tree:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    links = tuple((int(v), read_link(part(f"{v}|"), meta)) for v, meta in header["links"])
    mark, held = int(header["mark"]), header["held"]
    return Parcel(int(header["version"]), mark, held, links, part("dense|"))
