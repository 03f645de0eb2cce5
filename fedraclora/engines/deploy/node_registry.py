"""Track which node serves which clients, and which version of the weights each node holds.

A node is asked when it is first seen, so that one that joins late, or returns under another node
id, is found at the next exchange. If several connected nodes claim a client, the node that was
registered first at the SuperLink serves it, whatever the order of their replies.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedraclora.config.settings import DeployConfig
from fedraclora.engines.base import Traffic, add_up
from fedraclora.engines.deploy.federation import FederationFiles, NodeFacts, Wishes
from fedraclora.engines.deploy.pulling import in_part, pulled
from fedraclora.engines.deploy.pushing import pushed
from fedraclora.engines.node_config import node_name
from fedraclora.engines.owner.entries import now
from fedraclora.engines.owner.refusal import OwnerRefusal
from fedraclora.engines.replies import FORMAT, OWNER_REFUSES, UNREADABLE, check_format
from fedraclora.errors import AbsentError, ConfigError, EngineError, WireError
from fedraclora.flower_internals import message_bytes
from fedraclora.wire.fields import printable, shown, whole_number

log = logging.getLogger(__name__)

UP, DOWN, BUNDLE = "up", "down", "bundle"  # ways of bytes in the ledger
PARTS = 10.0  # seconds for the parts of a reply, which is small
PATIENCE = 60.0  # seconds for further nodes to report their clients, once enough have
DRAINED = OwnerRefusal("the operator has drained it (`fedraclora federation undrain`)")
LATE = 10.0  # seconds by which a node or a reply is late, and stands in the ledger
AGAIN = 20.0  # seconds without a reply until a node is asked again, doubled each time


class RegistryContext(Protocol):
    """Define the part of a grid that a registry needs."""

    run_id: str
    settings: DeployConfig
    incidents: list[str]
    traffic: Traffic

    @property
    def grid(self) -> Grid:
        """Return Flower's own grid."""

    def wait(self, what: str) -> None:
        """Wait a moment."""

    def tell(self, text: str) -> None:
        """Record an incident, and tell the operator at once."""


@dataclass(frozen=True)
class Question:
    """A request to a node to report its clients.

    Attributes:
        node: The node.
        first: When the first of its unanswered requests was sent.
        at: When this request was sent.
        pause: Seconds until the node is asked again.
    """

    node: int
    first: float
    at: float
    pause: float


class NodeRegistry:
    """Find the node of each client.

    Args:
        post: Sends its questions.
        federation: Where the operator's wishes are, and what is known of nodes is kept; or None.
        bundle: Bytes of the app's bundle, which each node downloads.

    Attributes:
        versions: The version that a node reports; None: no weights.
    """

    def __init__(
        self,
        post: RegistryContext,
        federation: FederationFiles | None = None,
        bundle: int = 0,
    ) -> None:
        self.post, self.federation, self.bundle = post, federation, bundle
        self._loaded: set[int] = set()  # nodes that have downloaded the bundle
        self._round: int | None = None
        self._drained: frozenset[int] = frozenset()  # nodes that take part in no further round
        self._removed: frozenset[int] = frozenset()  # nodes that the operator has removed
        self._replied: dict[int, str] = {}  # node -> when its last reply was read
        self._kept: dict[int, NodeFacts] = {}  # what the files say by now
        self.versions: dict[int, int | None] = {}
        self.names: dict[int, str] = {}  # node -> the name that operator or owner gave it
        self._given: dict[int, str] = {}  # node -> the name with which it was registered
        self._registered: dict[int, str] = {}  # node -> when it was registered
        self._serving: dict[int, list[int]] = {}  # node -> its clients
        # nodes that did not report their clients: the reason, and when it came
        self._unfit: dict[int, tuple[OwnerRefusal, float]] = {}
        self._reported: set[tuple[int, str]] = set()  # nodes and reasons among the incidents
        self._asked: dict[str, Question] = {}  # requests without a reply so far
        self._enough: float | None = None  # time since which enough clients are known
        self._node: dict[int, int] = {}  # client -> the node that served it last
        self._claims: dict[int, dict[int, str]] = {}  # client -> a sentence on each further node

    def forget(self, node: int) -> None:
        """Ask a node again if it is still connected."""
        self._serving.pop(node, None)

    def retry_request(self, node: int) -> str | None:
        """Ask a node again for its clients; return the request, or None if the node serves none."""
        now = time.monotonic()
        return self._ask(Question(node, now, now, AGAIN)) if self._serving.get(node) else None

    def has_answered(self, question: str) -> bool:
        """Read new answers; return whether a request has one."""
        self._look()
        return question not in self._asked

    def begin(self, round_: int) -> None:
        """Do what the operator wants before a new round: pause, and leave out drained nodes."""
        if round_ == self._round:
            return
        self._round, told = round_, False
        while (wishes := self._wishes()).paused:
            if not told:
                self.post.tell(
                    f"paused before round {round_}, until `fedraclora federation resume`"
                )
            told = True
            self.post.wait("the operator had ended the pause")
        if told:
            self.post.tell(f"the pause before round {round_} has ended")
        self._drained = wishes.drained
        self._note_removed(wishes.removed)

    def _note_removed(self, removed: frozenset[int]) -> None:
        """Tell which nodes of this run the operator has removed since this was last called."""
        for node in sorted((removed - self._removed) & self._registered.keys()):
            clients = [c for c, last in self._node.items() if last == node]
            who = self.served_by(clients) if clients else f"{self._name(node)} is"
            self.post.tell(
                f"{who} removed (`fedraclora federation remove`): the SuperLink refuses the key"
            )
        self._removed = removed

    def _wishes(self) -> Wishes:
        """Read what the operator wants; as before if it cannot be read."""
        before = Wishes(drained=self._drained, removed=self._removed)
        try:
            return before if self.federation is None else self.federation.wishes()
        except ConfigError as error:
            log.warning("the operator's wishes stay as they were: %s", error)
            return before

    def label(self, node: int) -> str:
        """Name a node in the ledger: by its name, or until it is known by its number."""
        return self.names.get(node) or str(node)

    def _call(self, node: int, name: str) -> None:
        """Record the name that a node's owner gave it, also of its traffic so far.

        The one that the operator gave it at its registration goes before.
        """
        if name and node not in self._given:
            self.names[node] = name
            moved = self.post.traffic.nodes.pop(str(node), {})
            add_up(self.post.traffic.nodes, {name: moved} if moved else {})

    def count_reply(self, node: int, reply: Message) -> None:
        """Count the bytes of a reply, and with the first one those of the app's bundle."""
        loaded = not reply.has_error() or reply.error.code == OWNER_REFUSES
        if loaded and node not in self._loaded:
            self._loaded.add(node)
            if self.bundle:
                self.post.traffic.count(self.label(node), BUNDLE, self.bundle)
        self.post.traffic.count(self.label(node), UP, message_bytes(reply))

    def replied(self, node: int) -> None:
        """Record that a reply of a node was read."""
        self._replied[node] = now()

    def keep_facts(self) -> None:
        """Keep what is known of the nodes, for `fedraclora federation status`."""
        if self.federation is None:
            return
        known = self._serving.keys() | self._replied.keys()
        facts = {}
        for node in known:
            why = self._unfit.get(node)
            clients = self._serving.get(node) or (() if why is None else why[0].clients)
            facts[node] = NodeFacts(
                self.names.get(node, ""),
                (*clients,),
                self._replied.get(node, ""),
                "" if why is None else str(why[0]),
            )
        if facts == self._kept:
            return
        self._kept = facts
        try:
            self.federation.note(facts)
        except (EngineError, ConfigError, OSError) as error:  # of no importance for the run
            log.info("what is known of the nodes is not kept: %s", error)

    def gather(self, clients: Sequence[int]) -> dict[int, int]:
        """Wait until enough clients are connected; return the node of each.

        Raises:
            AbsentError: If too few are connected in time.
            EngineError: If more clients are claimed by several nodes than the run allows.
        """
        settings = self.post.settings
        enough = min(settings.min_clients or len(clients), len(clients))
        began, away = time.monotonic(), dict[int, float]()  # client -> when it last was
        # other nodes may be repaired by now
        self._serving = {n: c for n, c in self._serving.items() if c}
        while True:
            self._look()
            self.keep_facts()
            nodes = self._nodes()
            found = {c: nodes[c] for c in clients if c in nodes}
            now = time.monotonic()
            away |= dict.fromkeys(set(clients) - found.keys(), now)
            if len(found) >= enough:
                self._enough = now if self._enough is None else self._enough
                if not self._waits(now):
                    self._note_wait({c: at - began for c, at in away.items() if c in found})
                    self._note_claims(nodes)
                    return found
            elif now > began + settings.wait:
                missing = sorted(set(clients) - found.keys())
                unfit = [f"; {self._unfit_now(node)}" for node in self._unfit]
                raise AbsentError(
                    f"{len(found)} of {len(clients)} clients were connected after "
                    f"{settings.wait:g} s (engine.wait), {enough} are wanted "
                    f"(engine.min_clients); missing are {missing[:10]}" + "".join(unfit)
                )
            wishes = self._wishes()
            self._drained &= wishes.drained  # the operator may want a node back
            self._note_removed(wishes.removed)
            self.post.wait("enough clients were connected")

    def _note_wait(self, seconds: dict[int, float]) -> None:
        """Record clients that were away for long when they were to train, and had served before."""
        late = sorted(c for c, s in seconds.items() if s >= LATE and c in self._node)
        if late:
            waited = f"after a wait of {max(seconds[c] for c in late):.0f} s"
            self.post.incidents.append(f"{self.served_by(late)} there again, {waited}")

    def _waits(self, now: float) -> bool:
        """Check whether a connected node may still report its clients in time."""
        new = [q for q in self._asked.values() if q.node not in self._serving]
        return any(now < max(q.first, self._enough or 0.0) + PATIENCE for q in new)

    def _nodes(self) -> dict[int, int]:
        """Return the node of each client: of those that claim it, the one registered first."""
        nodes: dict[int, int] = {}
        for node in sorted(self._serving, key=lambda n: (self._registered.get(n, ""), n)):
            for client in self._serving[node]:
                nodes.setdefault(client, node)
        return nodes

    def _note_claims(self, nodes: dict[int, int]) -> None:
        """Record clients that several nodes claim, or that another node served before.

        Raises:
            EngineError: If there are more than the run allows.
        """
        new: dict[str, list[int]] = {}
        for node, served in self._serving.items():
            for client in served:
                keeper, before = nodes[client], self._node.get(client, nodes[client])
                known = self._claims.get(client, {})
                self._node[client] = keeper
                if node != keeper and node not in known:
                    note = f"served by {self._name(keeper)}, which was registered first; "
                    note += f"{self._name(node)} claims the same, and is not asked"
                    self._claims.setdefault(client, {})[node] = note
                    new.setdefault(note, []).append(client)
                if before != keeper:
                    note = f"served by {self._name(keeper)} from here on, in place of "
                    note += self._name(before)
                    self._claims.setdefault(client, {}).setdefault(keeper, note)
                    new.setdefault(note, []).append(client)
        self.post.incidents += [f"{_told(sorted(own))}: {note}" for note, own in new.items()]
        most, claimed = self.post.settings.max_claims, sorted(self._claims)
        if most is not None and len(claimed) > most:
            note = next(iter(self._claims[claimed[0]].values()))
            raise EngineError(
                f"engine.max_claims={most}: more than one node claims {_told(claimed)} "
                f"(client {claimed[0]}: {note}). Stop the node that should not serve it (`flwr "
                "supernode unregister NODE`), then resume"
            )

    def _name(self, node: int) -> str:
        """Name a node by its name, and as `flwr supernode list` does."""
        when, name = self._registered.get(node), self.names.get(node)
        facts = [f"node {node}"] * bool(name) + [f"registered {when}"] * bool(when)
        return (name or f"node {node}") + (f" ({', '.join(facts)})" if facts else "")

    def absence(self, client: int) -> str:
        """Say why a client is absent, and which node served it last."""
        last = self._node.get(client)
        if last in self._removed:
            return f"the operator has removed {self._name(last)}, which served it"
        for node, (why, _) in self._unfit.items():
            if node == last or client in why.clients:
                return self._unfit_now(node)
        if silent := sorted({q.node for q in self._asked.values()} - self._serving.keys()):
            names = ", ".join(map(self._name, silent))
            return f"no node that has answered serves it, and {names} has not said what it serves"
        return "it is not connected" + ("" if last is None else f"; {self._name(last)} served it")

    def served_by(self, clients: Sequence[int]) -> str:
        """Return the clients, their nodes and the verb of a sentence: "client 3 (north) is"."""
        names = dict.fromkeys(self.names.get(self._node.get(c, -1), "") for c in clients)
        told = ", ".join(filter(None, names))
        verb = "is" if len(clients) == 1 else "are"
        return f"{_told(clients)}{f' ({told})' if told else ''} {verb}"

    def refused(self, node: int, text: str) -> str:
        """Record that the owner of a node's data refuses a message; return the reason.

        The node is asked whether it serves before it is sent another message of a round.
        """
        why = OwnerRefusal.read(text)
        self.replied(node)
        self._call(node, why.name)
        self._exclude(node, why)
        return self._unfit_now(node)

    def _unfit_now(self, node: int) -> str:
        """Say why a connected node does not take part."""
        why, name = self._unfit[node][0], self.names.get(node)
        facts = [f"node {node}"] * bool(name) + [_told(why.clients)] * bool(why.clients)
        who = (name or f"node {node}") + (f" ({', '.join(facts)})" if facts else "")
        return f"{who} does not take part: {why}"

    def _exclude(self, node: int, why: OwnerRefusal) -> None:
        """Record why a node does not take part; tell each reason once."""
        self._serving[node], self._unfit[node] = [], (why, time.monotonic())
        if (node, why.why) in self._reported:
            return
        self._reported.add((node, why.why))
        settings = self.post.settings
        if settings.min_clients is None:
            tries = settings.retries + 1
            until = datetime.now(UTC) + timedelta(seconds=settings.wait * tries)
            what = (
                f"the run waits until {until:%H:%M} UTC (engine.wait={settings.wait:g} s, {tries} "
                f"times by engine.retries={settings.retries})"
            )
        else:
            what = f"with engine.min_clients={settings.min_clients} rounds may go on without it"
        asked = "" if node in self._drained else "it is asked again, and "
        self.post.tell(f"{self._unfit_now(node)}; {asked}{what}")

    def _look(self) -> None:
        """Ask new nodes for their clients, and read the replies that have arrived."""
        post, now = self.post, time.monotonic()
        nodes = [*post.grid.get_nodes()]
        there = {n.node_id: n.registered_at for n in nodes}
        self._registered |= there
        self._given |= {n.node_id: n.name for n in nodes if n.name}
        self.names |= self._given
        self._serving = {n: c for n, c in self._serving.items() if n in there}
        self._asked = {name: q for name, q in self._asked.items() if q.node in there}
        for name, asked in list(self._asked.items()):
            # Its reply may have been lost, and then the node does not know.
            if asked.node not in self._serving and now > asked.at + asked.pause:
                del self._asked[name]
                self._ask(replace(asked, at=now, pause=2 * asked.pause))
        self._unfit = {n: unfit for n, unfit in self._unfit.items() if n in there}
        for node, (why, when) in self._unfit.items():
            if now > when + AGAIN:  # its owner may have approved the run
                self._unfit[node] = why, now
                self._serving.pop(node, None)
        for node in there.keys() & self._drained:
            clients = self._serving.get(node) or self._unfit.get(node, (DRAINED, 0))[0].clients
            self._exclude(node, replace(DRAINED, clients=(*clients,)))
        for node in sorted(there.keys() - self._serving - {q.node for q in self._asked.values()}):
            self._ask(Question(node, now, now, AGAIN))
        for name, asked in list(self._asked.items()):
            # One by one: Flower returns none of several replies if one cannot be decoded.
            try:
                for reply in pulled(post.grid, [name], time.monotonic() + PARTS):
                    del self._asked[name]
                    self.count_reply(asked.node, reply)
                    if in_part(reply):
                        self._ask(replace(asked, at=now))
                        continue
                    if reply.has_error() and reply.error.code == OWNER_REFUSES:
                        self.refused(asked.node, str(reply.error.reason))
                    else:
                        self._introduce(asked.node, *_read(reply))
            except (*UNREADABLE, WireError) as error:
                self._asked.pop(name, None)
                self._exclude(asked.node, OwnerRefusal(printable(str(error))))

    def _ask(self, question: Question) -> str:
        """Ask a node for its clients; return Flower's number of the message."""
        content = RecordDict({"job": ConfigRecord({"run": self.post.run_id, "format": FORMAT})})
        ttl = self.post.settings.timeout
        query = Message(content, question.node, "query.partition", ttl=ttl)
        node = self._name(question.node)
        name = pushed(self.post.grid, query, node, self.post.incidents)
        self.post.traffic.count(self.label(question.node), DOWN, message_bytes(query))
        self._asked[name] = question
        return name

    def _introduce(self, node: int, mine: list[int], version: int | None, name: str) -> None:
        """Record a node's clients, its version and its name."""
        self._serving[node] = mine
        self._unfit.pop(node, None)
        self.replied(node)
        self._reported = {(n, why) for n, why in self._reported if n != node}
        self.versions[node] = version
        self._call(node, name)


def _told(clients: Sequence[int]) -> str:
    """Name clients: the only one, or the first of several."""
    return f"client {clients[0]}" if len(clients) == 1 else f"clients {shown([*clients])}"


def _read(reply: Message) -> tuple[list[int], int | None, str]:
    """Read a node's clients, its version (None for no weights), and its name."""
    if reply.has_error():
        raise ValueError(reply.error.reason)
    answer = reply.content["partition"]
    if not isinstance(answer, ConfigRecord):
        raise TypeError("its answer is not a config record")
    check_format(answer.get("format"), "it")
    ids, version = answer["ids"], whole_number(answer["held"], "the version that it holds", -1)
    if not isinstance(ids, list):
        raise TypeError(f"it reports {shown(ids)} as its clients, expected a list of ids")
    mine = sorted({whole_number(c, "a client that it serves") for c in ids})
    return mine, version if version >= 0 else None, node_name(answer)
