"""Nodes of a deployment in this process: what answers and the messages are real, not the network.

What goes over it is written to bytes and read back. A fault may do what it likes with a message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from typing_extensions import override

from fedraclora.clients import node as client_node
from fedraclora.clients.respond import respond
from fedraclora.compose.overrides import composed
from fedraclora.engines.records import clients_of, folded, unfolded
from fedraclora.experiments.faults.grid import FakeGrid
from fedraclora.flower_internals import records_from_bytes, records_to_bytes
from fedraclora.strategies.server_app import app as server_app

SMALL = [
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "partition=dirichlet",
    "model.hidden=[12]",
    "clients=3",
    "clients_per_round=3",
    "rounds=3",
    "local.lr=0.1",
    "output=study",
    "output.chain=true",
]

RANK = ["method.rank=2", "method.alpha=3"]
RANKLESS = {"method=fedavg", "method=decomfl", "method=fedkseed", "method=ferret"}

Fault = Callable[[Message, Callable[[], Message]], list[Message]]


def small(words: Sequence[str], folder: Path, engine: str) -> dict[str, object]:
    """The config of a small run."""
    rank = [] if RANKLESS & {*words} else RANK
    return composed([*SMALL, *rank, f"engine={engine}", f"output.dir={folder}", *words])


def over_the_wire(content: RecordDict) -> RecordDict:
    """What comes out at the other end."""
    raw = records_to_bytes(content)
    return records_from_bytes(raw)


@dataclass
class Network(FakeGrid):
    """Stands for Flower's grid.

    Attributes:
        cache: Where nodes keep files.
        nodes: Node id to what its configuration says.
        fault: Does what it likes with train messages; is handed what answers them.
        sent: All messages, with the replies, unfolded.
        posted: The same as they went over the wire.
    """

    cache: Path
    nodes: dict[int, dict[str, bool | float | int | str]]
    fault: Fault | None = None
    run_config: dict[str, bool | float | int | str] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)
    posted: list[Message] = field(default_factory=list)
    on_round: Callable[[int], None] | None = None

    @override
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            if self.on_round is not None and message.metadata.group_id:
                self.on_round(int(message.metadata.group_id))
            message.metadata.__dict__["_message_id"] = name = str(next(self.ids))
            self.waiting[name] = opened = with_content(message, unfolded(message.content))
            names.append(name)
            self.sent.append(opened)
            self.posted.append(message)
        return names

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for name in list(message_ids):
            message = self.waiting.pop(name)
            replies = self.serve(message)
            if not replies:
                self.waiting[name] = message
            found += replies
        self.sent += found
        came = [
            with_content(m, folded(m.content)) if self.is_training(m) and m.has_content() else m
            for m in found
        ]
        self.posted += came
        return [copy(m) for m in came[::-1]]  # what it is read as is not what came

    def serve(self, message: Message) -> list[Message]:
        """Answer as a node would."""
        node = message.metadata.dst_node_id
        if node not in self.nodes:
            return [Message(Error(5, "Node Unavailable"), reply_to=message)]
        if self.fault is None or not self.is_training(message):
            return [self.call(message)]
        return self.fault(message, lambda: self.call(message))

    def call(self, message: Message) -> Message:
        """Answer as the process that stays on a node does, when it is new."""
        node = message.metadata.dst_node_id
        config = {"cache": str(self.cache / str(node)), **self.nodes[node]}
        asked = Message(
            over_the_wire(folded(message.content)),
            dst_node_id=node,
            message_type=message.metadata.message_type,
            group_id=message.metadata.group_id,
        )
        asked.metadata.__dict__["_message_id"] = message.metadata.message_id
        context = Context(1, node, config, RecordDict(), self.run_config)
        client_node.worker_of.cache_clear()  # what a node has after its process was replaced
        reply = respond(asked, context)
        if reply.has_error():
            return Message(reply.error, reply_to=message)
        return Message(unfolded(over_the_wire(reply.content)), reply_to=message)

    def train_messages(self) -> list[Message]:
        """What was sent to clients that train, and what they sent back."""
        return [m for m in self.sent if self.is_training(m)]

    @staticmethod
    def is_training(message: Message) -> bool:
        """Whether a message is one of those."""
        return message.metadata.message_type == "train.cohort"


def with_content(message: Message, content: RecordDict) -> Message:
    """Give a message another content, beside the one that has it; they share their metadata."""
    found = copy(message)
    found.content = content
    return found


def nodes_for(clients: int) -> dict[int, dict[str, bool | float | int | str]]:
    """One node for each client, under ids in no order."""
    return {1000 - 7 * k: {"partition-id": k} for k in range(clients)}


def deploy(words: Sequence[str], folder: Path, network: Network, *, resume: bool = False) -> None:
    """Run the ServerApp on a network."""
    serve(small(words, folder, "deploy"), network, resume=resume)


def serve(plain: Mapping[str, object], network: Network, *, resume: bool = False) -> None:
    """Run the ServerApp with a config on a network."""
    network.run_config = {"cfg-json": json.dumps(plain), "resume": resume}
    context = Context(1, 1, {}, RecordDict(), network.run_config)
    server_app(grid=network, context=context)


def rows(folder: Path) -> list[dict[str, object]]:
    """The ledger of a run."""
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def client(message: Message) -> int:
    """Whom a train message is for."""
    (found,) = clients_of(message.content)
    return found
