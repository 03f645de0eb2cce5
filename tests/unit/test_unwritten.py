"""Contents that are written where somebody looks into them."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedraclora.wire.unwritten import Records, held_by, unwritten, written

HELD = object()


def records() -> Records:
    return {"config": ConfigRecord({"header": "{}"}), "chunk": ConfigRecord({"first": 3})}


def test_nothing_is_written_while_nobody_looks() -> None:
    def write() -> Records:
        raise AssertionError("somebody looked")

    assert held_by(unwritten(HELD, write)) is HELD
    assert held_by(RecordDict(records())) is None


@pytest.mark.parametrize(
    "look",
    [
        lambda c: c["config"],
        lambda c: c.get("own"),
        list,
        len,
        lambda c: "chunk" in c,
        lambda c: c.__setitem__("more", ConfigRecord()),
        lambda c: c.__delitem__("chunk"),
        lambda c: c.config_records,
    ],
)
def test_whoever_looks_gets_records_and_they_count_from_then_on(
    look: Callable[[RecordDict], object],
) -> None:
    content, plain = unwritten(HELD, records), RecordDict(records())
    assert look(content) == look(plain)
    assert held_by(content) is None
    assert content == plain


@pytest.mark.parametrize(
    "moved",
    [
        lambda c: pickle.loads(pickle.dumps(c)),
        lambda c: recorddict_from_proto(recorddict_to_proto(c)),
        RecordDict.copy,
        written,
    ],
)
def test_what_leaves_the_process_is_written(moved: Callable[[RecordDict], RecordDict]) -> None:
    found = moved(unwritten(HELD, records))
    assert held_by(found) is None
    assert found == RecordDict(records())
