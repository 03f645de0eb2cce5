"""Nodes of somebody's Flower app in this process: a fake grid, on which real ClientApps answer.

Messages go as bytes and come as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result
from torch import nn
from typing_extensions import override

from fedraclora import flower
from fedraclora.experiments.faults.grid import FakeGrid
from fedraclora.experiments.faults.network import over_the_wire
from fedraclora.tree import Tree
from tests.common import normal

STEPS, KEY = 3, "num-examples"
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


def network() -> nn.Module:
    """A network whose first weights are the same in every process."""
    with torch.random.fork_rng():  # what it draws and does not keep is no draw of the training
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(normal(*parameter.shape, key=name) / 3)
    return model


def samples(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples of a client; no two have as many."""
    x = normal(8 + 3 * client, 7, key=client).float()
    return x, x[:, :3].argmax(dim=1)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Somebody's own training."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    order = torch.randperm(len(x))  # of the generator that a round seeds
    for rows in order.split(-(-len(x) // STEPS)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def app_of(model_of: Callable[[], nn.Module] = network, share: float = 0) -> ClientApp:
    """Somebody's ClientApp; ``share``: of what its weight is in the place of its samples."""
    app = ClientApp()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        x, y = samples(int(context.node_config["partition-id"]))
        with flower.round(message, context, model_of()) as r:
            loss = train(r.model, x, y)
        weight = share * len(x) if share else len(x)
        return r.reply({KEY: weight, "train_loss": loss}, loss=loss, steps=STEPS)

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        x, y = samples(int(context.node_config["partition-id"]))
        with flower.round(message, context, model_of()) as r, torch.no_grad():
            loss = float(nn.functional.cross_entropy(r.model(x), y))
        return r.reply({KEY: len(x), "eval_loss": loss})

    return app


def nodes_of(tmp_path: Path, count: int = 4, fault: Fault | None = None, **more: Any) -> Nodes:
    """Nodes under ids in no order, half of which no int64 holds; ``turned``: in another."""
    ids = {(2**63 if k % 2 else 0) + 1000 - 7 * k: k for k in range(count)}
    if more.get("turned"):
        ids = dict(zip(ids, [*range(1, count), 0], strict=True))
    return Nodes(more.get("app", app_of()), tmp_path / "cache", ids, fault)


def run(nodes: Nodes, method: Any, rounds: int = 3, **options: Any) -> tuple[Any, Result]:
    """Run by Flower's `start`, as in somebody's ServerApp."""
    options = {"min_available_nodes": len(nodes.nodes), "fraction_evaluate": 0.0} | options
    kind = options.pop("kind", flower.LowRank)
    initial = ArrayRecord(options.pop("initial", network().state_dict()))
    strategy = kind(method, options.pop("model", network()), **options)
    return strategy, strategy.start(grid=nodes, initial_arrays=initial, num_rounds=rounds)


def weights_of(result: Result) -> Tree:
    """The weights that `start` gives."""
    return {name: torch.from_numpy(array.numpy()) for name, array in result.arrays.items()}
