"""Write messages as Flower's records, and read them back.

A dataclass is written by the codec (`fedraclora.codec`): its plain fields as JSON in the record
``config``, per-client values as bytes in ``chunk`` (a list would be checked number by number), and
its numbers as one array in ``arrays``, since a Flower deployment is slow with many small arrays.

Flower 1.42 stores every object of a message separately, and each hop requests each by itself: a
message is one, its content another, a record a third, and an array in it two more. On real hosts
records are folded: all small ones are in the record `job`, which makes three objects in all. Large
arrays stay separate: Flower cuts them into parts, and keeps one copy for many clients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedraclora.codec import from_bytes, join, split, to_bytes
from fedraclora.engines.replies import RECORDS
from fedraclora.errors import WireError
from fedraclora.flower_internals import records_from_bytes, records_to_bytes
from fedraclora.tree import Tree, to_numpy
from fedraclora.weights.update import WeightUpdate
from fedraclora.wire.answers import VECTORS, Answer
from fedraclora.wire.exchange import Ask
from fedraclora.wire.fields import parsed, reading, shown, whole_number
from fedraclora.wire.reply import received

R = TypeVar("R", ConfigRecord, ArrayRecord)
UPDATE = "update"  # the record of an update of base weights
UPDATE_NUMBERS = "update-numbers"
JOB = "job"  # the record of a message that contains the others
APART = 1 << 18  # bytes of arrays from which their record stays separate
PART = 1 << 22  # the same if no other client receives them: Flower would cut them soon


# --- replies -------------------------------------------------------------------------------------


def write_answer(answer: Answer) -> RecordDict:
    """Write a reply as records."""
    tensors, plain = split(answer.packed())
    numbers = tensors.pop(answer.payload, None)
    found = {"config": header_record(plain), "chunk": vector_record(tensors)}
    arrays = {} if numbers is None else {"arrays": array_record(numbers)}
    return RecordDict({**found, **arrays})


def read_answer(records: RecordDict, ask: Ask) -> Answer:
    """Read and check a reply from another machine; no other code reads unchecked data.

    If a field has a wrong type or range, the reply is refused. The server checks whether it answers
    the request.

    Args:
        records: The records of the message.
        ask: The request that it answers.

    Raises:
        WireError: Naming the found and the expected value.
    """
    round_ = ask.request.round_
    with reading(f"round {round_}: a reply"):
        plain = read_json(records, "config")
        kind = Answer.known.get(str(plain.get("is")), Answer)
        tensors = read_vectors(records)
        if "arrays" in records:
            tensors[kind.payload] = read_array(records, "arrays")
        return received(join(Answer, tensors, plain), ask)


# --- updates of base weights ---------------------------------------------------------------------


def add_weight_update(records: RecordDict, update: WeightUpdate) -> None:
    """Write a weight update into a message, replacing an existing one."""
    tensors, plain = split(update, coding=update.coding)
    raw, table = to_bytes(tensors)
    records[UPDATE] = header_record({"update": plain, "tensors": table})
    records[UPDATE_NUMBERS] = array_record(raw)


def read_weight_update(records: RecordDict) -> WeightUpdate:
    """Read the weight update of a message.

    Raises:
        WireError: If it has none, or a damaged one.
    """
    with of_message(records), reading("an update of base weights"):
        header = read_json(records, UPDATE)
        if header.keys() != {"update", "tensors"}:
            raise WireError(
                f"the weight update has the fields {shown([*header])}, expected update and tensors"
            )
        tensors = from_bytes(read_array(records, UPDATE_NUMBERS), header["tensors"])
        return join(WeightUpdate, tensors, header["update"])


# --- records -------------------------------------------------------------------------------------


def header_record(header: object) -> ConfigRecord:
    """Write plain JSON values."""
    return ConfigRecord({"header": json.dumps(header)})


def vector_record(vectors: Mapping[str, torch.Tensor]) -> ConfigRecord:
    """Write short vectors (`VECTORS`) as bytes."""
    return ConfigRecord({name: to_numpy(vector).tobytes() for name, vector in vectors.items()})


def array_record(flat: torch.Tensor) -> ArrayRecord:
    """Write one array."""
    return tree_record({"flat": flat})


def tree_record(tree: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Write named tensors, one array each."""
    return ArrayRecord({name: Array(to_numpy(tensor)) for name, tensor in tree.items()})


def record_of(records: RecordDict, name: str, kind: type[R]) -> R:
    """Return the record ``name`` of a message.

    Raises:
        WireError: If there is none, or one of another kind.
    """
    record = records.get(name)
    if not isinstance(record, kind):
        raise WireError(
            f"the message has the records {shown(list(records))}, expected the "
            f"{kind.__name__} {name}"
        )
    return record


def read_json(records: RecordDict, name: str) -> dict[str, Any]:
    """Read the JSON object in the record ``name``.

    Raises:
        WireError: If it is missing or invalid.
    """
    text = record_of(records, name, ConfigRecord).get("header")
    return parsed(text, f"the header in the record {name}")


def read_vectors(records: RecordDict) -> Tree:
    """Read the vectors of a message, by their paths.

    Raises:
        WireError: If they are incomplete or unknown.
    """
    found: Tree = {}
    for path, raw in record_of(records, "chunk", ConfigRecord).items():
        if path == "first":
            continue
        kind = VECTORS.get(path.partition("/")[0])
        if kind is None or not isinstance(raw, bytes) or len(raw) % kind.itemsize:
            raise WireError(
                f"the message has {shown(raw)} for the vector {shown(path)}, expected bytes "
                f"of one of {[*VECTORS]}"
            )
        found[path] = torch.empty(len(raw) // kind.itemsize, dtype=kind)
        found[path].view(torch.uint8).copy_(torch.from_numpy(np.frombuffer(raw, np.uint8).copy()))
    return found


def clients_of(records: RecordDict) -> list[int]:
    """Read the ids of the clients of a message.

    Raises:
        WireError: If it names none.
    """
    vectors = read_vectors(records)
    if "clients" not in vectors:
        raise WireError("the message does not name its clients")
    ids: list[int] = vectors["clients"].tolist()
    return ids


@contextmanager
def of_message(records: RecordDict) -> Iterator[None]:
    """Add the round and the clients of a message to errors while it is read."""
    try:
        yield
    except WireError as error:
        asked = read_json(records, "config").get("request")
        round_ = whole_number(asked.get("round_") if isinstance(asked, dict) else None, "its round")
        raise WireError(f"round {round_}, clients {shown(clients_of(records))}: {error}") from error


def read_array(records: RecordDict, name: str, key: str = "flat") -> torch.Tensor:
    """Read an array of the record ``name``; the tensor may have any alignment.

    Args:
        records: The records of the message.
        name: The name of the record.
        key: The key of the array in it.

    Raises:
        WireError: If it is missing, or its bytes do not match its shape.
    """
    record = record_of(records, name, ArrayRecord)
    with reading(f"the array of the record {name}"):
        _check_bytes(record[key].data)
        return torch.from_numpy(record[key].numpy())


def _check_bytes(data: bytes) -> None:
    """Reject bytes that are no array, or not as many as stated, before memory is allocated."""
    stream = BytesIO(data)
    formats = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = formats[np.lib.format.read_magic(stream)](stream)
    size, came = prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if size != came:
        raise WireError(
            f"an array of shape {shown(shape)} and type {dtype} takes {size} bytes, but the "
            f"message has {came}"
        )


# --- folded --------------------------------------------------------------------------------------


def folded(content: RecordDict, apart_from: int = APART) -> RecordDict:
    """Write the small records of a content into its record `job`, as a new content."""
    records = {name: record for name, record in content.items() if name != JOB}
    apart = {name: record for name, record in records.items() if _size(record) >= apart_from}
    inside = {name: record for name, record in records.items() if name not in apart}
    job = ConfigRecord(dict(content.config_records.get(JOB, {})))
    job[RECORDS] = records_to_bytes(RecordDict(inside))
    return RecordDict({**apart, JOB: job})


def unfolded(content: RecordDict) -> RecordDict:
    """Read back the output of `folded`; return other contents unchanged.

    Raises:
        WireError: If the folded records cannot be read, or one also exists separately.
    """
    job = content.get(JOB)
    if not isinstance(job, ConfigRecord) or RECORDS not in job:
        return content
    with reading("the records that are folded into a message"):
        inside = records_from_bytes(job[RECORDS])
    if twice := inside.keys() & content.keys():
        raise WireError(f"the message has the records {shown(sorted(twice))} twice, expected once")
    rest = {name: value for name, value in job.items() if name != RECORDS}
    apart = {name: record for name, record in content.items() if name != JOB}
    return RecordDict({**inside, **apart, **({JOB: ConfigRecord(rest)} if rest else {})})


def _size(record: ArrayRecord | ConfigRecord | MetricRecord) -> int:
    """Count the bytes of a record's arrays."""
    return sum(len(a.data) for a in record.values()) if isinstance(record, ArrayRecord) else 0
