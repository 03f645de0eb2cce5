"""Nodes of somebody's Flower app in this process: a fake grid, on which real ClientApps answer.

Messages go as bytes and come as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from typing_extensions import override

from tests.campaigns.faults.network import over_the_wire
from tests.messages import FakeGrid

Fault = Callable[[Message, Callable[[], Message]], Message | None]


@dataclass
class Nodes(FakeGrid):
    """Flower's grid for Flower's loop.

    Attributes:
        app: Of the clients.
        cache: Where nodes keep files.
        nodes: Their ids, each with the partition that it has.
        fault: Does what it likes with a message; None stands for no reply.
        sent: All messages and replies, as they went.
    """

    app: ClientApp
    cache: Path
    nodes: dict[int, int]
    fault: Fault | None = None
    sent: list[Message] = field(default_factory=list)

    @override
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = name = str(next(self.ids))
            self.waiting[name] = message
            self.sent.append(message)
            names.append(name)
        return names

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [self.waiting.pop(name) for name in message_ids if name in self.waiting]
        found = [reply for message in asked if (reply := self.served(message)) is not None]
        self.sent += found
        return found[::-1]

    @override
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return list(self.pull_messages(list(self.push_messages(messages))))

    def served(self, message: Message) -> Message | None:
        """Answer as a node would, whose process has just started."""
        return (
            self.call(message)
            if self.fault is None
            else self.fault(message, lambda: self.call(message))
        )

    def call(self, message: Message) -> Message:
        """Hand a message to the app; what it raises is an error reply, as Flower words it."""
        node = message.metadata.dst_node_id
        config = {"cache": str(self.cache / str(node)), "partition-id": self.nodes[node]}
        context = Context(1, node, config, RecordDict(), {})
        asked = Message(
            over_the_wire(message.content),
            dst_node_id=node,
            message_type=message.metadata.message_type,
            group_id=message.metadata.group_id,
        )
        asked.metadata.__dict__["_message_id"] = message.metadata.message_id
        try:
            reply = self.app(asked, context)
        except Exception as error:
            return Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message)
        return Message(over_the_wire(reply.content), reply_to=message)
