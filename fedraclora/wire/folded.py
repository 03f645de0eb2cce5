"""Contents of messages as few objects: on real hosts small records travel inside one of them.

Flower 1.42 stores every object of a message apart, and each hop asks for each by a request of its
own: a message is one, its content another, a record a third, and an array in it two more. Folded
into the record `job`, whatever is small makes three in all. Large arrays stay apart: Flower cuts
them into parts, and takes one copy of what many clients are sent.
"""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedraclora.errors import WireError
from fedraclora.wire.fields import reading, shown

JOB = "job"  # the record of a message that takes the others
RECORDS = "records"  # where in it they are
APART = 1 << 18  # bytes of arrays from which their record stays apart


def folded(content: RecordDict) -> RecordDict:
    """Write the small records of a content into its record `job`; it is not modified."""
    apart = {name: record for name, record in content.items() if name != JOB and _is_large(record)}
    inside = {n: record for n, record in content.items() if n != JOB and n not in apart}
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


def _is_large(record: ArrayRecord | ConfigRecord | MetricRecord) -> bool:
    """Check whether a record has an array, or arrays, of many bytes."""
    return isinstance(record, ArrayRecord) and sum(len(a.data) for a in record.values()) >= APART
