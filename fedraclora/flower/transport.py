"""Write the messages of `LowRank`: those of a deployment, in the form of Flower's `FedAvg`.

A message has the config of the app, one record `job` with all small values, and large arrays
separately. A reply has one record of metrics, and after training one of arrays, as FedAvg's own
checks require.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import DEFAULT_TTL, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from typing_extensions import override

from fedraclora.config.settings import DeployConfig
from fedraclora.engines.deploy.grid import DeployGrid, Envelope
from fedraclora.engines.records import read_answer
from fedraclora.engines.replies import APP_RAISED
from fedraclora.errors import StaleError, WireError
from fedraclora.run.client_state import ClientStore
from fedraclora.tree import Tree
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.answers import Answer, NoAnswer, NumericAnswer, TrainedAnswer
from fedraclora.wire.exchange import Ask
from fedraclora.wire.fields import shown
from fedraclora.wire.together import Answered


class FlowerTransport(DeployGrid):
    """Write a message for each node that Flower has sampled, and read the replies.

    Args:
        grid: Flower's own.
        history: The versions of the base weights.
        key: The key of the app's config in a message.
        fields: Facts for each client: ``seed`` of the run, ``weight``, the name of a reply's weight
            among its metrics, and whether it has the initial weights (``known``).
        timeout: Seconds to wait for a node that needs all weights.
        run: Name of the run, under which nodes keep its weights.

    Attributes:
        config: The app's config for its clients.
        contents: The reply of each client, by its number: metrics, and trained arrays.
        names: The nodes of this exchange by the number of their client.
        numbers: Numbers of all nodes, in the order of their first request.
    """

    def __init__(
        self,
        grid: Grid,
        history: WeightHistory,
        key: str,
        fields: dict[str, Any],
        timeout: float,
        run: str,
    ) -> None:
        known = bool(fields["known"])
        super().__init__(grid, history, run, DeployConfig(timeout=timeout), known=known)
        self.key, self.fields, self.config = key, fields, ConfigRecord()
        self.contents: dict[int, RecordDict] = {}
        self.names: dict[int, int] = {}
        self.numbers: dict[int, int] = {}
        self._order: dict[int, tuple[int, int]] = {}
        self._unnamed = False
        self._envelopes: list[Envelope] = []

    def address(self, nodes: Iterable[int]) -> torch.Tensor:
        """Number the nodes of an exchange; their clients in ascending order, int64 [K]."""
        there = sorted(nodes)
        for node in there:
            self.numbers.setdefault(node, len(self.numbers))
        self.names = {self.numbers[node]: node for node in there}
        return torch.tensor(sorted(self.names), dtype=torch.int64)

    def write(self, asks: Sequence[Ask], kind: str, config: ConfigRecord) -> list[Message]:
        """Write the messages of an exchange, one for each request."""
        self.kind, self.config, self.contents, self._envelopes = kind, config, {}, []
        for ask in asks:
            (client,) = ask.clients
            node = self.names[client]
            self._envelopes.append(self._envelope([ask], node, DEFAULT_TTL))
        return [envelope.message for envelope in self._envelopes]

    def read_all(self, replies: Iterable[Message]) -> list[Answered]:
        """Read the replies; a node that requests all weights receives them once, and is waited for.

        Clients are ordered by their ``partition-id``, if nodes have one: node ids differ from run
        to run, and a sum depends on its order.
        """
        for envelope in self._envelopes:
            self.count(envelope)
        sent = {envelope.message.metadata.message_id: envelope for envelope in self._envelopes}
        arrived = [(reply.metadata.reply_to_message_id, reply) for reply in replies]
        waiting = {name: sent[name] for name, _ in arrived if name in sent}  # not for late nodes
        found = self.receive(waiting, time.monotonic() + self.settings.timeout, arrived)
        good = [(ask, a) for ask, a in found if isinstance(a, Answer)]
        if any(ask.apart for ask, _ in good):
            return found
        asks = sorted((ask for ask, _ in good), key=lambda ask: ask.clients)
        good.sort(key=lambda pair: self._order[pair[0].clients[0]])
        names, contents = dict(self.names), dict(self.contents)
        moved: list[Answered] = []
        for ask, (own, answer) in zip(asks, good, strict=True):
            request, (was,), (now,) = ask.request, own.clients, ask.clients
            self.names[now], self.contents[now] = names[was], contents[was]
            there: dict[str, Any] = {"clients": request.clients}
            there |= {"first": request.first} if isinstance(answer, NumericAnswer) else {}
            moved.append((ask, replace(answer, **there)))
        return moved + [pair for pair in found if not isinstance(pair[1], Answer)]

    @override
    def job(self) -> ConfigRecord:
        return ConfigRecord({"run": self.run_id, **self.fields})

    @override
    def wrapped(self, content: RecordDict) -> RecordDict:
        return RecordDict({**content, self.key: self.config})

    @override
    def read(self, reply: Message, envelope: Envelope) -> list[Answered] | NoAnswer | None:
        if reply.has_error() and StaleError.__name__ in str(reply.error.reason):
            return None
        if reply.has_error() and reply.error.code == APP_RAISED:
            # Most failures are in its training, when it has the weights; otherwise it requests them
            # next time.
            self.registry.versions[envelope.node] = self.history.version
        return super().read(reply, envelope)

    @override
    def answered(self, content: RecordDict, envelope: Envelope) -> Answer:
        (client,), key = envelope.ask.clients, str(self.fields["weight"])
        (name, metrics), *more = content.metric_records.items() or [("", MetricRecord())]
        weight = metrics.get(key)
        if more or isinstance(weight, list) or not weight or len(content.array_records) > 1:
            raise WireError(
                f"the reply must have one record of metrics with a number {key!r}, and at most "
                f"one of arrays, but has {shown([*content])}, and {shown(weight)}"
            )
        numbers = ((n, x) for n, v in metrics.items() for x in (v if isinstance(v, list) else [v]))
        if odd := {n: x for n, x in numbers if not math.isfinite(x)}:
            raise WireError(f"its metrics {shown(odd)} are not finite numbers")
        partition = content.config_records["job"].get("partition")
        if not isinstance(partition, int) and not self._unnamed:
            self._unnamed = True
            self.incidents.append(
                f"node {envelope.node} has no whole number as partition-id in its node-config, "
                "so seeds follow the order of node ids and another run has other results"
            )
        self._order[client] = (partition if isinstance(partition, int) else 2**63, client)
        request = envelope.ask.request
        if envelope.message.metadata.message_type == MessageType.EVALUATE:
            self.contents[client] = RecordDict({name: metrics})
            return Answer(round_=request.round_, version=request.version, clients=request.clients)
        answer = read_answer(content, envelope.ask)
        if not isinstance(answer, TrainedAnswer):
            raise WireError(f"the reply is {answer.name!r}, but must be 'trained'")
        kind = torch.int64 if isinstance(weight, int) else torch.float64
        answer = replace(answer, samples=torch.tensor([weight], dtype=kind))
        self.contents[client] = RecordDict({name: metrics, **content.array_records})
        return answer


class NodeStore(ClientStore):
    """Store the nodes, and the version that each holds, as a part of a checkpoint."""

    def __init__(self, transport: FlowerTransport) -> None:
        super().__init__()
        self.transport = transport

    @override
    def state(self) -> Tree:
        held = [self.transport.registry.versions.get(node) for node in self.transport.numbers]
        nodes = np.array([*self.transport.numbers], np.uint64).view(np.int64)
        versions = torch.tensor([-1 if v is None else v for v in held], dtype=torch.int64)
        return {"nodes": torch.from_numpy(nodes), "held": versions}

    @override
    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        nodes = tensors["nodes"].numpy().view(np.uint64).tolist()
        self.transport.numbers = {node: k for k, node in enumerate(nodes)}
        held = zip(nodes, tensors["held"].tolist(), strict=True)
        self.transport.registry.versions = {node: v if v >= 0 else None for node, v in held}
