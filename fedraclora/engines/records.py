"""Messages as Flower's records: the one place where these are made and read.

Flower 1.42 stores every object of a message apart, and each hop asks for each by a request of its
own: a message is one, its content another, a record a third, and an array in it two more. On real
hosts records travel folded: whatever is small lies in the record `job`, which makes three in all.
Large arrays stay apart: Flower cuts them into parts, and takes one copy of what many clients are
sent.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from io import BytesIO
from math import prod

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedraclora.errors import WireError
from fedraclora.tree import to_numpy
from fedraclora.wire.fields import reading, shown
from fedraclora.wire.records import Content, Fields, Tensors

Made = MutableMapping[int, tuple[Tensors, ArrayRecord]]
JOB = "job"  # the record of a message that takes the others
RECORDS = "records"  # where in it they are
APART = 1 << 18  # bytes of arrays from which their record stays apart
PART = 1 << 22  # the same where nobody else is sent them: Flower would cut them soon


def to_records(content: Content, made: Made | None = None) -> RecordDict:
    """Write a message as Flower's records.

    Args:
        content: The message.
        made: Takes what was written of tensors that other messages share, and gives it.
    """
    found = RecordDict()
    for name, record in content.items():
        if isinstance(record, Fields):
            found[name] = ConfigRecord(dict(record))
            continue
        _, arrays = (made or {}).get(id(record), (record, None))
        if arrays is None:
            arrays = ArrayRecord({key: Array(to_numpy(t)) for key, t in record.items()})
        if made is not None and name == "arrays":
            made[id(record)] = (record, arrays)  # the tensors, too: else their id is given again
        found[name] = arrays
    return found


def from_records(records: RecordDict) -> Content:
    """Read a message back from Flower's records.

    Raises:
        WireError: If the bytes of an array are not those of the shape that it names.
    """
    return {name: _read(name, record) for name, record in records.items()}


def message_bytes(message: Message) -> int:
    """Count the bytes of a message as Flower sends it: a tree of objects, large arrays in parts."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def _read(name: str, record: ArrayRecord | ConfigRecord | MetricRecord) -> Fields | Tensors:
    if not isinstance(record, ArrayRecord):
        return Fields(record)
    with reading(f"the array of the record {name}"):
        for array in record.values():
            _check_bytes(array.data)
        return Tensors({key: torch.from_numpy(a.numpy()) for key, a in record.items()})


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


def folded(content: RecordDict, apart_from: int = APART) -> RecordDict:
    """Write the small records of a content into its record `job`; it is not modified."""
    records = {name: record for name, record in content.items() if name != JOB}
    apart = {name: record for name, record in records.items() if _size(record) >= apart_from}
    inside = {name: record for name, record in records.items() if name not in apart}
    job = ConfigRecord(dict(content.config_records.get(JOB, {})))
    job[RECORDS] = recorddict_to_proto(RecordDict(inside)).SerializeToString()
    return RecordDict({**apart, JOB: job})


def unfolded(content: RecordDict) -> RecordDict:
    """Read back what `folded` wrote; a content in which nothing is folded is given as it is.

    Raises:
        WireError: If what is folded cannot be read, or names a record that is there besides.
    """
    job = content.get(JOB)
    if not isinstance(job, ConfigRecord) or RECORDS not in job:
        return content
    with reading("the records that are folded into a message"):
        inside = recorddict_from_proto(ProtoRecordDict.FromString(job[RECORDS]))
    if twice := inside.keys() & content.keys():
        raise WireError(f"a message has the records {shown(sorted(twice))} twice; once is wanted")
    rest = {name: value for name, value in job.items() if name != RECORDS}
    apart = {name: record for name, record in content.items() if name != JOB}
    return RecordDict({**inside, **apart, **({JOB: ConfigRecord(rest)} if rest else {})})


def _size(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    """Count the bytes of a record's arrays."""
    return sum(len(a.data) for a in record.values()) if isinstance(record, ArrayRecord) else 0
