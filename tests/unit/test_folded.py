"""Small records in one: what comes out is what went in, in as few objects as can be."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedraclora.engines.records import (
    APART,
    array_record,
    folded,
    header_record,
    read_array,
    unfolded,
    vector_record,
)
from fedraclora.errors import WireError
from fedraclora.experiments.faults.grid import become_a_task


def small() -> RecordDict:
    plain = {
        "config": header_record({"round": 3, "names": ["fc1.weight"]}),
        "arrays": array_record(torch.tensor([[1.5, float("nan")], [-0.0, 2.0]])),
        "chunk": vector_record({"clients": torch.tensor([2, 2**40])}),
        "empty": array_record(torch.zeros(0, dtype=torch.uint8)),
        "job": ConfigRecord({"run": "abc", "mark": b"\x00\xff", "held": -1}),
    }
    found = RecordDict(plain)
    found["told"] = MetricRecord({"loss": 0.25, "steps": [1, -2]})
    return found


def objects(content: RecordDict) -> dict[str, object]:
    become_a_task()
    message = Message(content, dst_node_id=7, message_type="train.cohort")
    return {**get_all_nested_objects(message)}


def test_what_comes_out_is_what_went_in() -> None:
    content = small()
    found = unfolded(folded(content))
    assert {**found} == {**content}
    assert {**content} == {**small()}  # it is not modified
    assert found["arrays"]["flat"].data == content["arrays"]["flat"].data  # type: ignore[union-attr]


def test_a_small_message_has_three_objects() -> None:
    assert len(objects(folded(small()))) == 3
    assert len(objects(small())) == 12


def test_a_large_array_stays_apart_and_is_one_for_all_who_are_sent_it() -> None:
    content, other = small(), small()
    large = {"arrays": array_record(torch.zeros(APART, dtype=torch.uint8))}
    content["arrays"] = other["arrays"] = large["arrays"]
    other["chunk"] = ConfigRecord(dict(vector_record({"clients": torch.tensor([3])})))
    sent, also = objects(folded(content)), objects(folded(other))
    assert len(sent) == 6
    assert len(sent.keys() & also.keys()) == 3  # the record, the array in it, and its one part
    assert {**unfolded(folded(content))} == {**content}


def test_a_content_without_a_job_comes_out_without_one() -> None:
    found = unfolded(folded(RecordDict({"stale": ConfigRecord({"held": 3})})))
    assert {**found} == {"stale": ConfigRecord({"held": 3})}


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"records": 7}, "cannot be read"),
        ({"records": "text"}, "cannot be read"),
        ({"records": b"\xff\xff"}, "cannot be read"),
        ({"records": [b"", b""]}, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_the_message(
    job: dict[str, int | str | bytes | list[bytes]], said: str
) -> None:
    with pytest.raises(WireError, match=said):
        unfolded(RecordDict({"job": ConfigRecord(job)}))  # type: ignore[arg-type]


def test_any_byte_that_is_lost_or_changed_is_an_error_or_seen_by_who_reads_on() -> None:
    """What is folded is read as any message is: nothing else may be raised."""
    raw = folded(small())["job"]["records"]
    assert isinstance(raw, bytes)
    for place in range(len(raw)):
        for damaged in (raw[:place], raw[:place] + bytes([raw[place] ^ 0x55]) + raw[place + 1 :]):
            content = RecordDict({"job": ConfigRecord({"run": "abc", "records": damaged})})
            try:
                read_array(unfolded(content), "arrays")
            except WireError:
                continue


@pytest.mark.parametrize("name", ["chunk", "job"])
def test_a_record_that_is_there_twice_is_refused(name: str) -> None:
    content = folded(RecordDict({"chunk": ConfigRecord({"first": 1})}))
    raw = folded(RecordDict({"xxx": ConfigRecord()}))["job"]["records"]
    assert isinstance(raw, bytes)
    if name == "job":
        content = RecordDict({"job": ConfigRecord({"records": raw.replace(b"xxx", b"job")})})
    else:
        content["chunk"] = ConfigRecord({"first": 2})
    with pytest.raises(WireError, match=f"the records \\['{name}'\\] twice"):
        unfolded(content)


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"job": ConfigRecord({"run": "a"})})])
def test_where_nothing_is_folded_it_stays_as_it_is(content: RecordDict) -> None:
    assert unfolded(content) is content
