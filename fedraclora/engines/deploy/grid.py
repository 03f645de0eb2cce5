"""The grid of real SuperNodes: every message brings its client's base weights up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from copy import copy
from functools import partial

from flwr.app import ConfigRecord, Error, Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from typing_extensions import override

from fedraclora.config.settings import DeployConfig
from fedraclora.engines.deploy.roster import Roster
from fedraclora.engines.deploy.traffic import Traffic
from fedraclora.engines.forwarding import ForwardingGrid
from fedraclora.engines.local import UNREADABLE, failed, is_stale
from fedraclora.errors import ClientError, WireError
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.fields import printable, shown
from fedraclora.wire.folded import folded, unfolded
from fedraclora.wire.records import clients_of
from fedraclora.wire.weight_update import add_weight_update

NODE_UNAVAILABLE = 5  # Flower's code for a node that is not there
PAUSE = 0.1  # seconds between looks for replies: each is a request
WRONG_WEIGHTS = 1001  # ours, far from Flower's


class DeployGrid(ForwardingGrid):
    """Sends each client its messages, with what its base weights lack.

    Args:
        grid: Flower's own.
        history: The versions of the base weights, published by the strategy.
        run_id: Of the run folder: under it clients keep weights and state.
        settings: Seconds to wait, and how many clients are enough.
        known: Whether clients can make the initial weights themselves.
        ended: Tells whether the runtime has ended.
        pause: Seconds between looks for replies.

    Attributes:
        incidents: What went wrong and was mended: sentences for the ledger.
        traffic: Bytes since the strategy last looked.
        roster: Who is where, and holds which version.
        one_by_one: Whether replies are asked for one by one: once one could not be decoded.
    """

    def __init__(
        self,
        grid: Grid,
        history: WeightHistory,
        run_id: str,
        settings: DeployConfig,
        *,
        known: bool,
        ended: Callable[[], bool] = lambda: False,
        pause: float = PAUSE,
    ) -> None:
        super().__init__(grid, ended=ended, pause=pause)
        self.history, self.run_id, self.settings = history, run_id, settings
        self.first = 0 if known else None  # what a client holds that holds nothing
        self.incidents: list[str] = []
        self.traffic = Traffic()
        self.roster = Roster(self)
        self.one_by_one = False

    @override
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages of one client each; give the replies that come in time.

        A client that is not connected gets an error for a reply.

        Raises:
            ClientError: If too few of the clients are connected in time.
            EngineError: If the runtime ended.
        """
        sent = {self._client(m): m for m in messages}
        nodes = self.roster.gather(list(sent))
        seconds = self.settings.timeout if timeout is None else timeout
        waiting, replies = {}, []
        for client, message in sent.items():
            if client in nodes:
                version = self.roster.versions.get((nodes[client], client))
                version = self.first if version is None else version
                waiting[self._push(message, nodes[client], version, seconds)] = message
            else:
                # Its own id, by which the strategy finds whose reply it is.
                message.metadata.__dict__["_message_id"] = f"not sent to client {client}"
                replies.append(failed(message, Error(NODE_UNAVAILABLE, "it is not connected")))
        return replies + self._receive(waiting, time.monotonic() + seconds)

    def _receive(self, waiting: dict[str, Message], end: float) -> list[Message]:
        """Wait for replies; whoever asks for every weight gets them, once."""
        replies, again = [], set[str]()
        while waiting:
            came = self._pulled(waiting)
            for reply in came:
                self.traffic.count(reply)
                asked = reply.metadata.reply_to_message_id
                message = waiting.pop(asked, None)
                if message is None:
                    self.incidents.append("a second reply to a message was ignored")
                elif not is_stale(opened := _opened(reply, message)):
                    replies.append(self._accept(opened, message))
                elif asked in again:
                    error = Error(NODE_UNAVAILABLE, "it asked for every base weight twice")
                    replies.append(failed(message, error))
                else:
                    client, left = self._client(message), max(1.0, end - time.monotonic())
                    self.incidents.append(f"client {client} was sent every base weight")
                    name = self._push(message, message.metadata.dst_node_id, None, left)
                    waiting[name] = message
                    again.add(name)
            if time.monotonic() > end:
                break
            if waiting and not came:
                self.wait("all clients had replied")
        return replies

    def _pulled(self, waiting: dict[str, Message]) -> list[Message]:
        """Pull the replies that have arrived.

        Flower decodes them together: if one is damaged it gives none back, and does not say whose
        it is. Then the round is run again and replies are asked for one by one, so that a damaged
        one is the failure of its client.

        Raises:
            ClientError: The first time that a reply cannot be decoded.
        """
        if not self.one_by_one:
            try:
                return list(self.grid.pull_messages(list(waiting)))
            except UNREADABLE as error:
                self.one_by_one = True
                raise ClientError(
                    f"a client's reply cannot be decoded ({printable(str(error))}); from here on "
                    "replies are asked for one by one, so that such a client is left out by name"
                ) from error
        found: list[Message] = []
        for name, message in waiting.items():
            try:
                found += self.grid.pull_messages([name])
            except UNREADABLE as error:
                why = f"its reply cannot be decoded: {printable(str(error))}"
                found.append(failed(message, Error(WRONG_WEIGHTS, why)))
        return found

    def _push(self, message: Message, node: int, version: int | None, seconds: float) -> str:
        """Send a message with what brings the client from version ``version`` to the newest."""
        update = self.history.since(version)
        add_weight_update(message.content, update)
        message.content["job"] = ConfigRecord({"run": self.run_id})
        message.metadata.dst_node_id, message.metadata.ttl = node, seconds
        sent = copy(message)  # with the metadata of this one, in which Flower notes its number
        sent.content = folded(message.content)
        (name,) = self.grid.push_messages([sent])
        self.traffic.count(sent)
        self.traffic.sent.append(id(message))
        self.traffic.fetched += update.payload_bytes
        return name

    def _accept(self, reply: Message, message: Message) -> Message:
        """Check a reply against the weights, and note the version that the client has now."""
        node = message.metadata.dst_node_id
        if reply.has_error():
            if reply.error.code == NODE_UNAVAILABLE:
                self.roster.forget(node)
            return reply
        newest = self.history.since(self.history.version)
        job = reply.content.get("job")
        proof = (job.get("held"), job.get("mark")) if isinstance(job, ConfigRecord) else None
        if proof != (expected := (newest.version, str(newest.mark))):
            came = "None" if proof is None else f"({', '.join(map(shown, proof))})"
            why = f"it trained on weights of version and fingerprint {came}, wanted are {expected}"
            return failed(message, Error(WRONG_WEIGHTS, why))
        self.roster.versions[node, self._client(message)] = newest.version
        return reply

    def _client(self, message: Message) -> int:
        (client,) = clients_of(message.content)
        return client


def look_again_soon() -> None:
    """Shorten the pause after which Flower looks again for parts of a reply, in this process.

    Flower 1.42 gives a reply out as soon as it is announced, before its parts have come, and then
    pauses for a second or more; no option changes that.
    """
    from flwr.superlink.grid import http_grid

    http_grid.pull_objects = partial(pull_objects, initial_backoff=PAUSE)  # type: ignore[attr-defined]


def _opened(reply: Message, message: Message) -> Message:
    """Unfold the reply to a message; one that cannot be read is the failure of its client."""
    if reply.has_error():
        return reply
    if not reply.has_content():
        return failed(message, Error(WRONG_WEIGHTS, "its reply is empty"))
    try:
        reply.content = unfolded(reply.content)
    except WireError as error:
        return failed(message, Error(WRONG_WEIGHTS, f"its reply is refused: {error}"))
    return reply
