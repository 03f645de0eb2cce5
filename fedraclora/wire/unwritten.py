"""Contents of messages that are written where somebody looks into them.

Between a server and clients of one process nobody does: the one holds what the other wrote. What
leaves the process is written there, since whatever serialises a content reads its records.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from functools import cached_property

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from typing_extensions import override

Records = dict[str, ArrayRecord | ConfigRecord | MetricRecord]


class _Unwritten(UserDict[str, ArrayRecord | ConfigRecord | MetricRecord]):
    """The records of a content, made on the first look at any of them."""

    def __init__(self, held: object, write: Callable[[], Records]) -> None:
        self.held, self.write = held, write  # the parent's would set `data`

    @cached_property
    @override
    def data(self) -> Records:  # type: ignore[override]
        return self.write()

    @override
    def __reduce__(self) -> tuple[type, tuple[Records]]:
        return dict, (self.data,)


def unwritten(held: object, write: Callable[[], Records]) -> RecordDict:
    """Build a content that has been read already, as ``held``, and that ``write`` gives records."""
    content = RecordDict()
    content.__dict__["_data"] = _Unwritten(held, write)  # where Flower's keeps its own
    return content


def written(content: RecordDict) -> RecordDict:
    """Write a content, as it leaves a process."""
    return RecordDict(dict(content.items()))


def held_by(content: RecordDict) -> object:
    """Return what a content holds; None once it has been written: its records may have changed."""
    records = content.__dict__["_data"]
    return records.held if isinstance(records, _Unwritten) and "data" not in vars(records) else None
