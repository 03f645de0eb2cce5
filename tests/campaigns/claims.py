"""Nodes that claim the same clients, by the hundred: who serves a client is no matter of speed.

    python -m tests.campaigns.claims --times 2000

Nodes come, go, answer after any time or never, and claim clients at random. In each exchange the
node of a client is, of those that are connected and have answered in time, the one registered
first; each claim and each move is told once, with both nodes and the client; and a run that allows
no claims ends with the first.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from typing_extensions import override

from fedraclora.config.settings import DeployConfig
from fedraclora.engines.base import Traffic
from fedraclora.engines.deploy import node_registry, straggler_monitor
from fedraclora.engines.deploy.node_registry import NodeRegistry
from fedraclora.engines.replies import FORMAT, OWNER_REFUSES
from fedraclora.errors import ClientError, EngineError
from fedraclora.experiments.faults.grid import FakeGrid
from fedraclora.rng import generator
from tests.campaigns.wire import must

STEP = 0.5  # seconds that a look takes
SEED, NEVER = 12, 1e9


@dataclass
class Link(FakeGrid):
    """A SuperLink with nodes: the clients of each.

    Attributes:
        delays: Seconds until a node's answer is there, in the order of its questions; the last
            holds for all further ones.
        registered: When each node was registered.
        now: What its clock says.
        refused: Nodes whose owner refuses, and the text of the refusal.
        names: With which nodes were registered.
        due: When the answer to each question is there.
        asked: The node of each question.
    """

    nodes: dict[int, list[int]]
    delays: dict[int, list[float]] = field(default_factory=dict)
    registered: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    now: float = 0.0
    due: dict[str, float] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    @override
    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(
                node_id=n, registered_at=self.registered.get(n, ""), name=self.names.get(n, "")
            )
            for n in self.nodes
        ]

    @override
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            node, name = message.metadata.dst_node_id, str(next(self.ids))
            message.metadata.__dict__["_message_id"] = name
            delays = self.delays.get(node, [0.0])
            self.due[name] = self.now + delays[min(self.asked.count(node), len(delays) - 1)]
            self.waiting[name] = message
            self.asked.append(node)
            names.append(name)
        return names

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for name in message_ids:
            message = self.waiting[name]
            node = message.metadata.dst_node_id
            if self.due[name] <= self.now and node in self.refused:
                found.append(Message(Error(OWNER_REFUSES, self.refused[node]), reply_to=message))
            elif self.due[name] <= self.now:
                ids = self.nodes[message.metadata.dst_node_id]
                record = ConfigRecord({"ids": ids, "held": -1, "format": FORMAT})
                found.append(Message(RecordDict({"partition": record}), reply_to=message))
        return found


class Waiting:
    """What a registry needs of its grid; to wait takes `STEP` seconds of the link's clock.

    Args:
        link: The grid.
        settings: Of the engine.
    """

    run_id = "r"

    def __init__(self, link: Link, **settings: Any) -> None:
        self.grid, self.incidents, self.traffic = link, list[str](), Traffic()
        self.settings = DeployConfig(**{"wait": 300.0, **settings})

    def wait(self, _: str) -> None:
        """Wait a moment."""
        self.grid.now += STEP

    def tell(self, text: str) -> None:
        """Record an incident."""
        self.incidents.append(text)


def clocks(link: Link) -> Any:
    """Let the registry and who watches for silence read the clock of a link, inside."""
    clock = SimpleNamespace(monotonic=lambda: link.now)
    return patch.multiple(node_registry, time=clock), patch.multiple(straggler_monitor, time=clock)


def trial(number: int) -> Counter[str]:
    """Let nodes come, go and claim for some exchanges; count what was seen.

    Raises:
        AssertionError: Saying what is wrong.
    """
    random, counts = generator(SEED, number), Counter[str]()
    clients = list(range(int(random.integers(1, 6))))
    names = [int(n) for n in random.choice(100, size=int(random.integers(2, 6)), replace=False) + 1]
    claims = {n: [c for c in clients if random.random() < 0.6] or [clients[0]] for n in names}
    order = {n: f"2026-01-{int(random.integers(1, 4)):02d}" for n in names}
    delays = {n: [float(random.choice([0.0, 3.0, 30.0, NEVER])), 1.0] for n in names}
    link = Link({}, delays, order)
    strict = number % 3 == 0
    post = Waiting(link, min_clients=1, wait=120.0, **({"max_claims": 0} if strict else {}))
    who, before, seen = NodeRegistry(post), dict[int, int](), set[tuple[int, int]]()
    one, two = clocks(link)
    with one, two:
        for _ in range(int(random.integers(2, 6))):
            there = [n for n in names if random.random() < 0.8]
            random.shuffle(there)
            link.nodes = {n: claims[n] for n in there}
            link.now += float(random.choice([1.0, 100.0]))
            post.incidents.clear()
            wanted = {
                c: min((order[n], n) for n in there if c in claims[n])[1]
                for c in clients
                if any(c in claims[n] for n in there)
            }
            claimed = {(n, c) for n in there for c in claims[n]} | {
                (n, c) for c, n in before.items()
            }
            twice = {c for c in wanted if len({n for n, k in claimed if k == c}) > 1}
            try:
                found = who.gather(clients)
            except ClientError:
                must(not wanted, "a run waits in vain for nodes that are there")
                counts["nobody there"] += 1
                continue
            except EngineError as error:
                must(strict and bool(twice | {c for _, c in seen}), f"it ends for nothing: {error}")
                counts["ended"] += 1
                return counts
            must(found == wanted, f"{found} for {wanted}")
            must(not (strict and twice), "a claim that the run does not allow")
            told = " ".join(post.incidents)
            for node, client in {(n, c) for c in twice for n, k in claimed if k == c}:
                if node != wanted[client] and (node, client) not in seen:
                    seen.add((node, client))
                    both = (node, wanted[client])
                    must(all(re.search(rf"\bnode {n}\b", told) for n in both), told)
                    counts["claim or move told"] += 1
            before |= wanted
            counts["exchange"] += 1
    return counts


def campaign(times: int, *, first: int = 0, tell: bool = False) -> Counter[str]:
    """Try nodes at random; count what was seen; ``tell``: print what is wrong, and go on."""
    counts = Counter[str]()
    for number in range(first, first + times):
        try:
            counts += trial(number)
        except Exception as error:
            if not tell:
                raise
            sys.stdout.write(f"trial {number}: {type(error).__name__}: {error}\n")
            counts["wrong"] += 1
    return counts


def main() -> int:
    """Run the campaign; the status is 1 if a trial came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    words = parser.parse_args()
    counts = campaign(words.times, first=words.first, tell=True)
    told = ", ".join(f"{what}: {n}" for what, n in sorted(counts.items()))
    sys.stdout.write(f"{told}\n")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
