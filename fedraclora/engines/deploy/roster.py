"""Who is where: which node serves which clients, and which version of the weights it holds.

A node is asked when it is first seen. So one that joins late, or comes back under another node id,
is found at the next exchange.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedraclora.config.settings import DeployConfig
from fedraclora.engines.base import Traffic
from fedraclora.engines.deploy.pulling import in_part, pulled
from fedraclora.engines.records import message_bytes
from fedraclora.engines.replies import FORMAT, UNREADABLE, check_format
from fedraclora.errors import ClientError, WireError
from fedraclora.wire.fields import printable, shown, whole

PARTS = 10.0  # seconds for the parts of an answer: it is small
PATIENCE = 60.0  # seconds for nodes that are there to say whom they serve, once enough have


class Post(Protocol):
    """What a roster needs of its grid."""

    run_id: str
    settings: DeployConfig
    incidents: list[str]
    traffic: Traffic

    @property
    def grid(self) -> Grid:
        """Flower's own grid."""

    def wait(self, what: str) -> None:
        """Wait a moment."""


class Roster:
    """Finds the node of each client.

    Args:
        post: Sends its questions.

    Attributes:
        versions: The version that a node holds, by its own word; None: nothing.
    """

    def __init__(self, post: Post) -> None:
        self.post = post
        self.versions: dict[int, int | None] = {}
        self._serving: dict[int, list[int]] = {}  # node -> its clients, in order of appearance
        self._unfit: dict[int, str] = {}  # nodes that could not say whom they serve, and why
        self._asked: dict[str, int] = {}  # question without an answer so far -> node

    def forget(self, node: int) -> None:
        """Ask a node anew, if it is still there."""
        self._serving.pop(node, None)

    def ask_again(self, node: int) -> str | None:
        """Ask a node again that serves somebody; give the question, None where it does not."""
        return self._ask(node) if self._serving.get(node) else None

    def has_answered(self, question: str) -> bool:
        """Look for answers; tell whether a question has one."""
        self._look()
        return question not in self._asked

    def gather(self, clients: Sequence[int]) -> dict[int, int]:
        """Wait until enough clients are connected; give the node of each that is.

        Raises:
            ClientError: If too few are in time.
        """
        settings = self.post.settings
        enough = min(settings.min_clients or len(clients), len(clients))
        began = time.monotonic()
        patient: float | None = None
        self._serving = {n: c for n, c in self._serving.items() if c}  # others may be mended by now
        self._unfit.clear()
        while True:
            self._look()
            found = self._find(clients)
            now = time.monotonic()
            if len(found) >= enough:
                patient = now + PATIENCE if patient is None else patient
                if len(found) == len(clients) or not self._asked or now > patient:
                    return found
            elif now > began + settings.wait:
                missing = sorted(set(clients) - found.keys())
                raise ClientError(
                    f"{len(found)} of {len(clients)} clients were connected after "
                    f"{settings.wait:g} s (engine.wait), {enough} are wanted "
                    f"(engine.min_clients); missing are {missing[:10]}"
                    + "".join(f"; a node cannot take part: {why}" for why in self._unfit.values())
                )
            self.post.wait("enough clients were connected")

    def _find(self, clients: Sequence[int]) -> dict[int, int]:
        nodes: dict[int, int] = {}
        for node, served in self._serving.items():
            for client in served:
                nodes.setdefault(client, node)  # whoever was there first, while it is there
        return {c: nodes[c] for c in clients if c in nodes}

    def _look(self) -> None:
        """Ask nodes that are new whom they serve, and read the answers that are there."""
        post = self.post
        there = set(post.grid.get_node_ids())
        self._serving = {n: c for n, c in self._serving.items() if n in there}
        self._asked = {q: n for q, n in self._asked.items() if n in there}
        for node in sorted(there - self._serving.keys() - set(self._asked.values())):
            self._ask(node)
        if not self._asked:
            return
        for question, node in list(self._asked.items()):
            # One by one: Flower gives back none of several replies if one cannot be decoded.
            try:
                for reply in pulled(post.grid, [question], time.monotonic() + PARTS):
                    del self._asked[question]
                    post.traffic.serialised += message_bytes(reply)
                    if in_part(reply):  # it is asked again
                        continue
                    self._introduce(node, *_read(reply))
            except (*UNREADABLE, WireError) as error:
                self._asked.pop(question, None)
                why = printable(str(error))
                post.incidents.append(f"a node cannot take part: {why}")
                self._serving[node], self._unfit[node] = [], why

    def _ask(self, node: int) -> str:
        """Ask a node whom it serves; give Flower's number of the question."""
        content = RecordDict({"job": ConfigRecord({"run": self.post.run_id, "format": FORMAT})})
        query = Message(content, node, "query.partition", ttl=self.post.settings.timeout)
        (name,) = self.post.grid.push_messages([query])
        self.post.traffic.serialised += message_bytes(query)
        self._asked[name] = node
        return name

    def _introduce(self, node: int, mine: list[int], version: int | None) -> None:
        """Note whom a node serves, and the version that it holds."""
        self._serving.pop(node, None)  # it was asked again
        if twice := sorted({*mine} & {c for each in self._serving.values() for c in each}):
            who = f"client {twice[0]}" if len(twice) == 1 else f"clients {shown(twice)}"
            self.post.incidents.append(f"a second node says that it serves {who}")
        self._serving[node] = mine
        self.versions[node] = version


def _read(reply: Message) -> tuple[list[int], int | None]:
    """Read whom a node serves, and the version that it holds; None for none."""
    if reply.has_error():
        raise ValueError(reply.error.reason)
    answer = reply.content["partition"]
    if not isinstance(answer, ConfigRecord):
        raise TypeError("its answer is not a record of settings")
    check_format(answer.get("format"), "it")
    ids, version = answer["ids"], whole(answer["held"], "the version that it holds", -1)
    if not isinstance(ids, list):
        raise TypeError(f"it says that it serves {shown(ids)}; a list of clients is wanted")
    mine = sorted({whole(c, "a client that it serves") for c in ids})
    return mine, version if version >= 0 else None
