"""Updates of base weights in train messages: a JSON header, and all numbers as one array."""

from __future__ import annotations

from fedraclora.codec import from_bytes, join, split, to_bytes
from fedraclora.weights.update import WeightUpdate
from fedraclora.wire.fields import exactly, reading
from fedraclora.wire.records import (
    Content,
    array_record,
    header_record,
    of_message,
    read_array,
    read_json,
)

FIELDS = frozenset({"update", "tensors"})
HEADER, NUMBERS = "parcel", "parcel-numbers"  # records of the message


def add_weight_update(content: Content, update: WeightUpdate) -> None:
    """Write an update into a message, in the place of one that is there."""
    tensors, plain = split(update, coding=update.coding)
    raw, table = to_bytes(tensors)
    content[HEADER] = header_record({"update": plain, "tensors": table})
    content[NUMBERS] = array_record(raw)


def read_weight_update(content: Content) -> WeightUpdate:
    """Read the update of a message.

    Raises:
        WireError: If it has none, or one that is damaged.
    """
    with of_message(content), reading("an update of base weights"):
        header = read_json(content, HEADER)
        exactly(header, FIELDS, "the header of an update")
        tensors = from_bytes(read_array(content, NUMBERS), header["tensors"])
        return join(WeightUpdate, tensors, header["update"])
