"""Send messages to real SuperNodes, each with weight updates and training requests."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid as FlowerGrid
from typing_extensions import override

from fedraclora.config.settings import DeployConfig
from fedraclora.engines.base import Traffic
from fedraclora.engines.deploy.federation import FederationFiles
from fedraclora.engines.deploy.node_registry import DOWN, NodeRegistry
from fedraclora.engines.deploy.pulling import LOOKS, in_part, pulled
from fedraclora.engines.deploy.pushing import pushed
from fedraclora.engines.deploy.stopping import StopSignals
from fedraclora.engines.deploy.straggler_monitor import Pace, StragglerMonitor
from fedraclora.engines.post import PostedGrid
from fedraclora.engines.records import (
    JOB,
    add_weight_update,
    folded,
    read_answer,
    unfolded,
)
from fedraclora.engines.replies import FORMAT, OWNER_REFUSES, STALE, UNREADABLE
from fedraclora.errors import ClientError, WireError
from fedraclora.flower_internals import error_code, message_bytes
from fedraclora.run.log import NOTICE
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.answers import Answer, Came, NoAnswer
from fedraclora.wire.exchange import Ask
from fedraclora.wire.fields import printable, shown
from fedraclora.wire.together import Answered, join_asks, split_answer

log = logging.getLogger(__name__)

Queues = dict[int, list[list[Ask]]]  # for each node, the requests of each message to send
Reply = tuple[str, Message | NoAnswer]  # a reply, with the number of the message that it answers
NODE_UNAVAILABLE = error_code("NODE_UNAVAILABLE")  # Flower's code for a node that is not connected
GONE = "the node went away: it was ended, or its connection to the SuperLink has broken"
# Bytes of requests and replies of several chunks in one message: both ends hold several copies, and
# a proxy limits the size of a request.
MOST = 1 << 25


@dataclass(frozen=True)
class Envelope:
    """Requests to single clients, packed into one message to their node.

    Attributes:
        asks: The requests.
        ask: All of them as one request.
        fetched: Payload bytes of its weight update.
        name: The name of the node, where its owner gave one.
    """

    asks: list[Ask]
    ask: Ask
    node: int
    message: Message
    fetched: int
    name: str = ""

    @property
    def who(self) -> str:
        """Return the clients of the message, for a log line."""
        who = "client" if len(self.asks) == 1 else "the node of clients"
        return f"{who} {shown(self.ask.clients)[1:-1]}" + (f" ({self.name})" if self.name else "")


class DeployGrid(PostedGrid):
    """Send messages to nodes, with the updates that their base weights need.

    Args:
        grid: Flower's own.
        history: The versions of the base weights, published by the strategy.
        run_id: Name of the run, under which clients keep weights and state.
        settings: Seconds to wait, and how many clients are enough.
        known: Whether clients can build the initial weights themselves.
        ended: Tells whether the runtime has ended.
        federation: The files of the operator; None if there are none.
        bundle: Bytes of the app's bundle.
        stops: Ends an exchange when the run is stopped.
        search: As for `PostedGrid`.

    Attributes:
        registry: The node of each client, and the version of each node.
        one_by_one: Whether replies are pulled one by one, after one could not be decoded.
    """

    def __init__(
        self,
        grid: FlowerGrid,
        history: WeightHistory,
        run_id: str,
        settings: DeployConfig,
        *,
        known: bool,
        ended: Callable[[], bool] = lambda: False,
        federation: FederationFiles | None = None,
        bundle: int = 0,
        stops: StopSignals | None = None,
        search: str = "",
    ) -> None:
        super().__init__(grid, ended=ended, pause=LOOKS, search=search)
        self.stops = stops or StopSignals()
        self.history, self.run_id, self.settings = history, run_id, settings
        self.first = 0 if known else None  # the version of a client without weights
        self.traffic: Traffic = Traffic()
        self.registry = NodeRegistry(self, federation, bundle)
        self.one_by_one, self._cut = False, False
        self._pace = Pace()
        self._missed: set[int] = set()  # clients without a reply to the last exchange with them

    @override
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        """Ask clients, with one message to each node unless it would be too large.

        Raises:
            ClientError: If too few of the clients are connected in time.
            EngineError: If the runtime ended, or the run is stopped.
        """
        with self.stops.waiting():
            return self._ask(asks, timeout)

    def _ask(self, asks: Sequence[Ask], timeout: float | None) -> list[Answered]:
        seconds = self.settings.timeout if timeout is None else timeout
        left, found = self.by_node(asks)
        waiting, end = dict[str, Envelope](), time.monotonic() + seconds
        for node in left:
            self._post(node, left, waiting, seconds)
        found += self.receive(waiting, end, left=left)
        self._note_returns(found)
        self.registry.keep_facts()
        return found

    def _note_returns(self, found: Sequence[Answered]) -> None:
        """Tell which clients are back after an exchange without them."""
        failed = {c for ask, own in found if isinstance(own, NoAnswer) for c in ask.clients}
        here = {c for ask, _ in found for c in ask.clients} - failed
        if back := sorted(here & self._missed):
            self.tell(f"{self.registry.served_by(back)} back")
        self._missed = (self._missed | failed) - here

    def by_node(self, asks: Sequence[Ask]) -> tuple[Queues, list[Answered]]:
        """Sort requests for single clients by node, for its messages; report absent clients."""
        if asks:
            self.registry.begin(asks[0].request.round_)
        nodes = self.registry.gather([client for ask in asks for client in ask.clients])
        mine, absent = dict[int, list[Ask]](), list[Answered]()
        for ask in asks:
            if (client := ask.clients[0]) in nodes:
                mine.setdefault(nodes[client], []).append(ask)
            else:
                absent.append((ask, NoAnswer(self.registry.absence(client))))
        size = int(self.settings.chunk)
        chunks = Counter(chunk for own in mine.values() for chunk, _ in by_chunk(own, size))
        if not self._cut and any(nodes > 1 for nodes in chunks.values()):
            self._cut = True
            self.incidents.append(
                f"clients of one chunk (engine.chunk={size}) are at several nodes, and train there "
                "apart: bits may differ from those of engine=vectorized"
            )
        return {node: parcels(own, size) for node, own in mine.items()}, absent

    def receive(
        self,
        waiting: dict[str, Envelope],
        end: float,
        came: Sequence[Reply] = (),
        left: Queues | None = None,
    ) -> list[Answered]:
        """Wait for replies; a node that requests all weights receives them once.

        Args:
            waiting: Sent messages, by Flower's number.
            end: The deadline.
            came: Replies that have already arrived.
            left: Messages to send to a node after it has replied.
        """
        found, again, cut = list[Answered](), set[str](), math.inf
        kind = next((exchange_kind(envelope.ask) for envelope in waiting.values()), "")
        monitor = StragglerMonitor(self.registry, self._pace.usual(kind))
        while waiting:
            end = min(end, cut := self._cutoff(found, monitor))
            last = time.monotonic() > end  # replies that had arrived by then are read
            came = came or self._pulled(waiting, end)
            self.incidents += monitor.late(
                [
                    waiting[name].who
                    for name, reply in came
                    if name in waiting and not is_error(reply)
                ]
            )
            for name, reply in came:
                envelope = waiting.pop(name, None)
                if isinstance(reply, Message):
                    self.registry.count_reply(reply.metadata.src_node_id, reply)
                if envelope is None:
                    self.incidents.append("a second reply to a message was ignored")
                    continue
                seconds = max(1.0, end - time.monotonic())
                answers = self.read(reply, envelope) if isinstance(reply, Message) else reply
                if answers is None and name not in again:
                    self.incidents.append(f"{envelope.who} was sent every base weight")
                    self.registry.versions[envelope.node] = None
                    again.add(self._push_again(envelope, waiting, seconds, whole=True))
                    continue
                if in_part(reply) and name not in again and seconds > 1:
                    self.incidents.append(f"{envelope.who} was asked again: half a reply came")
                    again.add(self._push_again(envelope, waiting, seconds))
                    continue
                if answers is None:
                    answers = NoAnswer("it asked for every base weight twice")
                if isinstance(answers, NoAnswer):
                    answers = [(ask, answers) for ask in envelope.asks]
                found += answers
                self._post(envelope.node, left or {}, waiting, seconds)
            if last:
                break
            if waiting and not came:
                self._pause(monitor, waiting)
            came = ()
            self._push_lost(monitor, waiting, max(1.0, end - time.monotonic()))
        if monitor.took:
            self._pace.add(kind, monitor.half)
        return found + (self._stragglers(waiting) if end == cut else [])

    def _push_lost(
        self, monitor: StragglerMonitor, waiting: dict[str, Envelope], seconds: float
    ) -> None:
        """Send again what nodes have not received."""
        for name in monitor.lost({name: envelope.node for name, envelope in waiting.items()}):
            envelope = waiting.pop(name)
            self.incidents.append(f"{envelope.who} was sent again what it had not received")
            self._push_again(envelope, waiting, seconds)

    def _pause(self, monitor: StragglerMonitor, waiting: Mapping[str, Envelope]) -> None:
        """Wait a moment for replies; tell the operator if one has been missing for long."""
        if told := monitor.overdue([envelope.who for envelope in waiting.values()]):
            log.log(NOTICE, "%s", told)
        self.wait("all clients had replied")

    def _stragglers(self, waiting: Mapping[str, Envelope]) -> list[Answered]:
        """Say of clients without a reply why the round goes on without them."""
        wait = f"engine.straggler_wait={self.settings.straggler_wait} s"
        why = NoAnswer(f"no reply within {wait} beyond twice the median time")
        return [(ask, why) for envelope in waiting.values() for ask in envelope.asks]

    def _cutoff(self, found: Sequence[Answered], monitor: StragglerMonitor) -> float:
        """Return when to stop waiting for the last clients, once as many have replied as needed."""
        least, wait = self.settings.min_clients, self.settings.straggler_wait
        replied = sum(not isinstance(answer, NoAnswer) for _, answer in found)
        return (
            math.inf if least is None or wait is None or replied < least else monitor.deadline(wait)
        )

    def _pulled(self, waiting: Mapping[str, Envelope], end: float) -> list[Reply]:
        """Yield the replies that have arrived, each with the number of the message it answers.

        Flower decodes them together: if one is damaged, it returns none, and does not say whose it
            is.
        Then the round is run again and replies are pulled one by one, so that a damaged one counts
        as the failure of its client.

        Raises:
            ClientError: The first time that a reply cannot be decoded.
        """
        found = list[Reply]()
        for names in ([name] for name in waiting) if self.one_by_one else [list(waiting)]:
            try:
                arrived = pulled(self.grid, names, end)
            except UNREADABLE as error:
                why = printable(str(error))
                if self.one_by_one:
                    found.append((names[0], NoAnswer(f"its reply cannot be decoded: {why}")))
                    continue
                self.one_by_one = True
                raise ClientError(
                    f"a client's reply cannot be decoded ({why}). The server now fetches "
                    "replies one by one, to find and exclude that client"
                ) from error
            found += [(reply.metadata.reply_to_message_id, reply) for reply in arrived]
        return found

    def _post(self, node: int, left: Queues, waiting: dict[str, Envelope], seconds: float) -> None:
        """Send a node's remaining messages: one, then the others once it has the new weights."""
        queue = left.get(node, [])
        while queue:
            envelope = self._envelope(queue.pop(0), node, seconds)
            waiting[self._push(envelope)] = envelope
            if self.registry.versions.get(node) != self.history.version:
                return  # this message brings the weights, which are sent only once

    def _envelope(
        self, asks: list[Ask], node: int, seconds: float, *, whole: bool = False
    ) -> Envelope:
        """Build a message that updates its node's weights; ``whole``: with all of them."""
        held, ask = self.registry.versions.get(node), join_asks(asks)
        update = self.history.since(None if whole else self.first if held is None else held)
        more = RecordDict({JOB: self.job()})
        add_weight_update(more, update)
        message = self.message(ask, node, more, seconds)
        message.content = self.wrapped(folded(message.content))
        name = self.registry.names.get(node, "")
        return Envelope(asks, ask, node, message, update.payload_bytes, name)

    def _push_again(
        self,
        envelope: Envelope,
        waiting: dict[str, Envelope],
        seconds: float,
        *,
        whole: bool = False,
    ) -> str:
        """Send the requests of an envelope again; return Flower's number of the message."""
        new = self._envelope(envelope.asks, envelope.node, seconds, whole=whole)
        waiting[name := self._push(new)] = new
        return name

    def job(self) -> ConfigRecord:
        """Return the facts that a client needs beside its requests."""
        return ConfigRecord({"run": self.run_id, "format": FORMAT})

    def wrapped(self, content: RecordDict) -> RecordDict:
        """Put the content of a message into its form for sending."""
        return content

    def _push(self, envelope: Envelope) -> str:
        """Send a message; return Flower's number of it."""
        name = pushed(self.grid, envelope.message, envelope.who, self.incidents)
        self.count(envelope)
        return name

    def count(self, envelope: Envelope) -> None:
        """Add a sent message to the traffic."""
        node = self.registry.label(envelope.node)
        self.traffic.count(node, DOWN, message_bytes(envelope.message))
        self.traffic.sent.append(envelope.ask)
        self.traffic.fetched += envelope.fetched

    def read(self, reply: Message, envelope: Envelope) -> list[Answered] | NoAnswer | None:
        """Read a reply, check it against the weights, and record its node's version.

        Returns:
            The replies; None if the node requests all full base weights.
        """
        if reply.has_error():
            return self._failed(reply, envelope)
        self.registry.replied(envelope.node)
        if not reply.has_content():
            return NoAnswer("its reply is empty")
        try:
            content = unfolded(reply.content)
            if STALE in content:
                return None
            self._check_job(content.get("job"))
            self.registry.versions[envelope.node] = self.history.version
            return split_answer(envelope.ask, self.answered(content, envelope), envelope.asks)
        except Exception as error:  # another machine may send anything
            return NoAnswer(f"its reply is refused: {error}")

    def _failed(self, reply: Message, envelope: Envelope) -> NoAnswer:
        """Read an error reply, and record what it says of its node."""
        if reply.error.code == OWNER_REFUSES:
            return NoAnswer(self.registry.refused(envelope.node, str(reply.error.reason)))
        found = self.refusal(reply)
        if reply.error.code == NODE_UNAVAILABLE:
            self.registry.forget(envelope.node)
            found = NoAnswer(GONE)
        name = f"{envelope.name}: " if envelope.name else ""
        return replace(found, reason=f"{name}{found.reason}")

    def _check_job(self, job: object) -> None:
        """Reject a reply from other weights, or from another run, which may have the same ones."""
        newest = self.history.since(self.history.version)
        facts = dict(job) if isinstance(job, ConfigRecord) else {}
        proof = facts.get("held"), facts.get("mark")
        if proof != (expected := (newest.version, str(newest.mark))):
            found = f"({', '.join(map(shown, proof))})"
            raise WireError(
                f"it trained on weights of version and fingerprint {found}, expected {expected}"
            )
        if (run := facts.get("run")) != self.run_id:
            raise WireError(f"it answers for run {shown(run)}, expected run {self.run_id}")

    def answered(self, content: RecordDict, envelope: Envelope) -> Answer:
        """Decode the reply of a node whose weights are up to date."""
        return read_answer(content, envelope.ask)


def is_error(reply: Message | NoAnswer) -> bool:
    """Check whether a reply is an error, perhaps Flower's own about a node that is gone."""
    return isinstance(reply, NoAnswer) or reply.has_error()


def exchange_kind(ask: Ask) -> str:
    """Name what is asked for: such exchanges take a like time."""
    return f"{ask.request.measure} {None if ask.stage is None else ask.stage.name}"


def by_chunk(asks: Iterable[Ask], size: int) -> Iterator[tuple[int, list[Ask]]]:
    """Yield the requests of each chunk of the round's clients, with its number."""
    for chunk, own in groupby(asks, key=lambda ask: ask.request.first // size):
        yield chunk, [*own]


def parcels(asks: Iterable[Ask], size: int) -> list[list[Ask]]:
    """Split the requests of a node into messages: whole chunks, up to `MOST` in all."""
    found, room = list[list[Ask]](), 0
    for _, chunk in by_chunk(asks, size):
        bytes_ = sum(map(_burden, chunk))
        if bytes_ > room or not found:
            found.append([])
            room = MOST
        found[-1] += chunk
        room -= bytes_
    return found


def _burden(ask: Ask) -> int:
    """Count a client's bytes in a message and its reply, in the largest case."""
    numbers = 0 if ask.downlink is None else 2 * ask.downlink.layout.size
    return 4 * numbers + (0 if ask.stage is None else ask.stage.length)
