"""Replies whose parts do not come: nobody waits for them for longer than is said."""

from __future__ import annotations

import time
from collections import Counter
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import http_grid

from fedraclora.engines.deploy.pulling import in_part, pulled
from fedraclora.engines.flower_patches import SERVER, patch
from fedraclora.experiments.faults.grid import become_a_task


class Link:
    """A SuperLink that has announced two replies; parts of the first are late.

    Args:
        looks: How often they are looked for in vain.
    """

    def __init__(self, looks: int) -> None:
        become_a_task()
        self.looks, self.seen, self.parts = looks, Counter[str](), list[dict[str, bytes]]()
        self.protos, self.trees = list[object](), list[object]()
        for k in range(2):
            asked = Message(RecordDict(), 5 + k, "train", ttl=100)
            asked.metadata.__dict__["_message_id"] = f"asked {k}"
            reply = Message(RecordDict({"it": ConfigRecord({"k": k})}), reply_to=asked)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            self.trees.append(get_object_tree(reply))
            self.parts.append({n: o.deflate() for n, o in get_all_nested_objects(reply).items()})
            reply.content = RecordDict()
            self.protos.append(message_to_proto(reply))

    def grid(self, monkeypatch: pytest.MonkeyPatch) -> http_grid.HttpGrid:
        """Make Flower's own grid, with this at its other end."""
        monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)  # put back after
        patch(SERVER)
        grid = http_grid.HttpGrid(token="any")
        grid._client = self
        grid._run = Run.create_empty(1)
        return grid

    def PullMessages(self, _: object) -> object:
        """Give out both."""
        return SimpleNamespace(messages_list=self.protos, message_object_trees=self.trees)

    def PullObject(self, request: PullObjectRequest) -> object:
        """Give out a part if it is there."""
        name = request.object_id
        self.seen[name] += 1
        late = name not in self.parts[1] and self.seen[name] <= self.looks
        content = b"" if late else {**self.parts[0], **self.parts[1]}[name]
        return SimpleNamespace(object_found=True, object_available=not late, object_content=content)

    def ConfirmMessageReceived(self, _: object) -> None:
        """Take note."""


def test_a_reply_whose_parts_are_late_is_an_error_and_keeps_no_other_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flower would look 500 times, with pauses of 10 s, before it pulls the second."""
    link = Link(looks=1 << 30)
    late, other = pulled(link.grid(monkeypatch), ["asked 0", "asked 1"], time.monotonic())
    assert in_part(late)
    assert late.metadata.reply_to_message_id == "asked 0"
    assert not in_part(other)
    assert other.content["it"] == ConfigRecord({"k": 1})
    assert max(link.seen.values()) == 1


def test_parts_that_come_in_time_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link(looks=1)
    first, _ = pulled(link.grid(monkeypatch), ["asked 0"], time.monotonic() + 1000)
    assert first.content["it"] == ConfigRecord({"k": 0})
    assert max(link.seen.values()) == 2
