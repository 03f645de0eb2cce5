"""A message whose push the SuperLink refuses in part is pushed again, and comes once."""

from __future__ import annotations

import math
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import http_grid

from fedraclora.engines.deploy.pushing import PUSHES, pushed
from fedraclora.errors import ClientError, EngineError
from fedraclora.experiments.faults.grid import become_a_task


class Link:
    """A SuperLink: some of its answers to parts are lost, and Flower sends those parts again.

    Args:
        lost: How many.
        most: Bytes of a part that a proxy before it accepts.
    """

    def __init__(self, lost: int, most: float = math.inf) -> None:
        become_a_task()
        self.most = most
        self.lost, self.sessions = lost, 0
        self.parts, self.messages = set[str](), set[str]()

    def grid(self) -> http_grid.HttpGrid:
        """Make Flower's own grid, with this at its other end."""
        grid = http_grid.HttpGrid(token="any")
        grid._client = self
        grid._run = Run.create_empty(1)
        return grid

    def PushMessages(self, request: PushAppMessagesRequest) -> object:
        """Keep a message once, and ask for the parts that are missing."""
        (message,), (tree,) = request.messages_list, request.message_object_trees
        self.messages.add(message.metadata.message_id)
        self.sessions += 1
        wanted = [part.object_id for part in iterate_object_tree(tree)]
        return SimpleNamespace(
            session_id=str(self.sessions),
            objects_to_push=[name for name in wanted if name not in self.parts],
            message_ids=[message.metadata.message_id],
        )

    def PushObject(self, request: PushObjectRequest) -> object:
        """Keep a part; refuse one that is here, as it is not asked for."""
        if len(request.object_content) > self.most:
            sent = httpx.Request("POST", "https://link")
            raise httpx.HTTPStatusError("", request=sent, response=httpx.Response(413))
        self.parts.add(request.object_id)
        self.lost -= 1
        return SimpleNamespace(stored=self.lost < 0)


def message() -> Message:
    """Return a message of three parts at least."""
    content = RecordDict({"one": ConfigRecord({"k": 1}), "two": ConfigRecord({"k": 2})})
    return Message(content, 7, "train", ttl=100)


@pytest.mark.parametrize("lost", [0, 1, PUSHES - 1])
def test_a_message_whose_answer_was_lost_is_pushed_again_and_comes_once(lost: int) -> None:
    link, incidents = Link(lost), list[str]()
    name = pushed(link.grid(), message(), "client 3 (north)", incidents)
    assert link.messages == {name}
    assert len(link.parts) >= 3
    assert len(incidents) == lost
    assert all("client 3 (north)" in said for said in incidents)


def test_a_superlink_that_goes_on_refusing_is_named_with_its_reason() -> None:
    link = Link(lost=1 << 30)
    with pytest.raises(ClientError, match=r"client 3 \(north\).*session may have expired"):
        pushed(link.grid(), message(), "client 3 (north)", [])
    assert link.sessions == PUSHES


def test_a_message_over_the_limit_of_a_proxy_ends_the_run_with_its_size() -> None:
    link, large = Link(lost=0, most=1 << 20), message()
    large.content["arrays"] = ArrayRecord({"w": Array(np.zeros(400_000, "float32"))})
    with pytest.raises(EngineError, match=r"client 3 \(north\).* 1\.6 MB.*client_max_body_size"):
        pushed(link.grid(), large, "client 3 (north)", [])
    assert link.sessions == 1
