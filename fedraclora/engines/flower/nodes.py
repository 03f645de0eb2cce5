"""Flower's grid with one node per client: clients are addressed by their id.

Node ids are random, new in every run; a client is its partition id. One query round finds which
node has which. Used inside a ServerApp, whichever of Flower's runtimes it runs in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import chain, islice

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from typing_extensions import override

from fedraclora.engines.forwarding import ForwardingGrid
from fedraclora.engines.local import APP_RAISED, failed, is_stale
from fedraclora.errors import ClientError, EngineError
from fedraclora.run.client_state import ClientStore
from fedraclora.weights.job import JobFolder
from fedraclora.wire.records import clients_of, read_tree, tree_record

log = logging.getLogger(__name__)

PROCESS_DIED = 0  # the code of Flower's error reply where Ray, not the ClientApp, failed
PAUSE = 0.05  # seconds between looks for replies
PATIENCE = 20.0  # seconds in which one more node must come, while some are missing
# Messages on their way. Flower's driver walks all of them for every node, ten times a second.
WINDOW = 256


class NodePerClient(ForwardingGrid):
    """A grid whose node ``k`` is the node of client ``k``.

    Args:
        grid: Flower's own.
        clients: Size of the population, and number of nodes.
        job: Where the client processes of this machine find settings and base weights.
        store: What clients keep between rounds; it travels with their messages, for any process
            may train any client.
        timeout: Seconds to wait for the nodes, and for replies unless a call says otherwise.
        ended: Tells whether the runtime has ended: nobody will reply.
    """

    def __init__(
        self,
        grid: Grid,
        clients: int,
        job: JobFolder,
        *,
        store: ClientStore,
        timeout: float,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(grid, ended=ended, pause=PAUSE)
        self.clients, self.job, self.store = clients, job, store
        self.timeout = timeout
        self._nodes: list[int] = []

    @override
    def get_node_ids(self) -> Iterable[int]:
        """Return the node of each client, in the order of their ids.

        Raises:
            EngineError: If nodes are missing, or their processes cannot run this project.
        """
        if not self._nodes:
            self._nodes = self._find_nodes()
        return self._nodes

    @override
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.grid.push_messages(self._address(m) for m in messages)

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.grid.pull_messages(message_ids)

    @override
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages of one client each to its node; give the replies that come in time.

        Raises:
            EngineError: If the runtime ended.
            ClientError: If a process died in a runtime that does not replace it.
        """
        seconds = self.timeout if timeout is None else timeout
        return self._exchange((self._address(m) for m in messages), seconds)

    @override
    def close(self) -> None:
        """Remove the folder of the job; the runtime is Flower's to end."""
        self.job.close()

    def _address(self, message: Message) -> Message:
        """Send a message to the node of its client, with all that a fresh process needs."""
        (client,) = clients_of(message.content)
        stored = self.store.part([client], int(message.metadata.group_id))
        message.metadata.dst_node_id = list(self.get_node_ids())[client]
        message.content["job"] = ConfigRecord({"folder": str(self.job.folder)})
        message.content["kept"] = tree_record(stored)
        return message

    def _exchange(self, messages: Iterable[Message], timeout: float) -> list[Message]:
        """Send and wait; Flower's own loop would wait on after the runtime has ended."""
        end = time.monotonic() + timeout
        left, sent, replies = iter(messages), dict[str, Message](), list[Message]()
        again = set[int]()  # clients that asked for the weights whole
        while True:
            for message in islice(left, WINDOW - len(sent)):
                message.metadata.ttl = timeout  # else a late one would be trained hours later
                sent |= dict.fromkeys(self.grid.push_messages([message]), message)
            if not sent:
                return replies
            came = list(self.grid.pull_messages(list(sent)))
            for reply in came:
                message = sent.pop(reply.metadata.reply_to_message_id)
                if is_stale(reply) and not again.issuperset(who := clients_of(message.content)):
                    log.warning("client %d asked for every base weight", *who)
                    again.update(who)
                    self.job.write_whole()
                    message.metadata.delivered_at = ""  # or Flower refuses to send it again
                    left = chain([message], left)
                else:
                    replies.append(self._judge(reply, message))
            if time.monotonic() > end:
                return replies
            if not came:
                self.wait("all clients had replied")

    def _judge(self, reply: Message, sent: Message) -> Message:
        """Keep what the client keeps; say what a dead process means."""
        if is_stale(reply):
            return failed(sent, Error(APP_RAISED, "it asked for every base weight twice"))
        if not reply.has_error():
            self.store.absorb(read_tree(reply.content, "kept"))
            return reply
        if reply.error.code != PROCESS_DIED:
            return reply
        reason = str(reply.error.reason)
        kind = reason.partition("ray.exceptions.")[2].partition("'")[0]  # no ids: those of Ray vary
        reason = kind or reason.partition("\n")[0][:200]
        if "chunk" not in sent.content:
            reply.error = Error(PROCESS_DIED, f"the process that trained it died: {reason}")
            return reply
        (client,) = clients_of(sent.content)
        # Flower hands nearly all later messages to the dead process.
        raise ClientError(
            f"round {sent.metadata.group_id}: the process that trained client {client} died "
            f"({reason}); Flower's runtime does not replace it, so the run stops here: mend what "
            "killed it (memory?) and go on with resume, or use engine=ray, which replaces processes"
        )

    def _find_nodes(self) -> list[int]:
        """Wait for the nodes, and ask each for its partition id."""
        patience = min(PATIENCE, self.timeout)
        came, end = 0, time.monotonic() + patience
        while len(ids := list(self.grid.get_node_ids())) < self.clients:
            self.wait("its nodes were there")
            if len(ids) > came:
                came, end = len(ids), time.monotonic() + patience
            if time.monotonic() > end:
                raise EngineError(
                    f"{len(ids)} nodes are there, and no other came in {patience:g} s, but "
                    f"{self.clients} are wanted: one for each client; with `flwr run`, "
                    "num-supernodes must be that number"
                )
        asked = (Message(RecordDict(), i, "query.partition", ttl=self.timeout) for i in ids)
        found = {}
        for reply in self._exchange(asked, self.timeout):
            if reply.has_error():
                raise EngineError(
                    f"Flower's processes cannot run this project: {reply.error.reason}"
                )
            found[int(str(reply.content["partition"]["id"]))] = reply.metadata.src_node_id
        if sorted(found) != list(range(self.clients)):
            raise EngineError(
                f"{len(ids)} nodes serve the partitions {sorted(found)[:5]}..., but each from 0 to "
                f"{self.clients - 1} must be served once; with `flwr run`, num-supernodes must be "
                f"{self.clients}"
            )
        return [found[k] for k in range(self.clients)]
