"""Flower's grid with one node per client: clients are addressed by their id.

Node ids are random, new in every run; a client is its partition id. One query round finds which
node has which. Used inside a ServerApp of Flower's simulation runtime.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid as FlowerGrid
from typing_extensions import override

from fedraclora.engines.post import PostedGrid
from fedraclora.engines.records import from_records
from fedraclora.engines.replies import is_stale
from fedraclora.errors import ClientError, EngineError
from fedraclora.run.client_state import ClientStore
from fedraclora.weights.replica import JobFolder
from fedraclora.wire.exchange import Answer, Ask, Came, NoAnswer
from fedraclora.wire.fields import printable
from fedraclora.wire.records import Content, Fields, read_tree, tree_record
from fedraclora.wire.reply import read_answer

T = TypeVar("T")
log = logging.getLogger(__name__)

PROCESS_DIED = 0  # the code of Flower's error reply where Ray, not the ClientApp, failed
PAUSE = 0.05  # seconds between looks for replies
PATIENCE = 20.0  # seconds in which one more node must come, while some are missing
# Messages on their way. Flower's driver walks all of them for every node, ten times a second.
WINDOW = 256


class NodePerClient(PostedGrid):
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
        grid: FlowerGrid,
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

    def nodes(self) -> list[int]:
        """Return the node of each client, in the order of their ids: each is asked, once.

        Raises:
            EngineError: If nodes are missing, or their processes cannot run this project.
        """
        if self._nodes:
            return self._nodes
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

        def question(node: int, seconds: float) -> Message:
            return Message(RecordDict(), node, "query.partition", ttl=seconds)

        found = {}
        for _, reply in self._exchange(deque(ids), question, self.timeout):
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
        self._nodes = [found[k] for k in range(self.clients)]
        return self._nodes

    @override
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        """Ask clients, each by a message of its own to its node.

        Raises:
            EngineError: If the runtime ended.
            ClientError: If a process died: this runtime does not replace it.
        """
        found: list[tuple[Ask, Answer | NoAnswer]] = []
        left, again = deque(asks), set[int]()
        seconds = self.timeout if timeout is None else timeout
        for ask, reply in self._exchange(left, self._envelope, seconds):
            (client,) = ask.clients
            if not is_stale(reply):
                found.append((ask, self._judged(reply, ask)))
            elif client in again:
                found.append((ask, NoAnswer("it asked for every base weight twice")))
            else:
                log.warning("client %d asked for every base weight", client)
                again.add(client)
                self.job.write_whole()
                left.appendleft(ask)
        return found

    @override
    def close(self) -> None:
        """Remove the folder of the job; the runtime is Flower's to end."""
        self.job.close()

    def _envelope(self, ask: Ask, seconds: float) -> Message:
        """Write a message to the node of a client, with all that a fresh process needs."""
        (client,) = ask.clients
        more: Content = {
            "job": Fields(folder=str(self.job.folder)),
            "kept": tree_record(self.store.part([client], ask.request.round_)),
        }
        return self.message(ask, self.nodes()[client], more, seconds)

    def _exchange(
        self, left: deque[T], write: Callable[[T, float], Message], timeout: float
    ) -> Iterator[tuple[T, Message]]:
        """Send a message for each that is left, and yield the replies that come in time.

        Flower's own loop would wait on after the runtime has ended.
        """
        end, sent = time.monotonic() + timeout, dict[str, T]()
        while left or sent:
            while left and len(sent) < WINDOW:
                each = left.popleft()
                (name,) = self.grid.push_messages([write(each, timeout)])
                sent[name] = each
            came = list(self.grid.pull_messages(list(sent)))
            for reply in came:
                yield sent.pop(reply.metadata.reply_to_message_id), reply
            if time.monotonic() > end:
                return
            if sent and not came:
                self.wait("all clients had replied")

    def _judged(self, reply: Message, ask: Ask) -> Answer | NoAnswer:
        """Keep what the client keeps; say what a dead process means."""
        if not reply.has_error():
            content = from_records(reply.content)
            self.store.absorb(read_tree(content, "kept"))
            return read_answer(content, ask)
        if reply.error.code != PROCESS_DIED:
            return self.refusal(reply)
        reason = str(reply.error.reason)
        kind = reason.partition("ray.exceptions.")[2].partition("'")[0]  # no ids: those of Ray vary
        (client,) = ask.clients
        # Flower hands nearly all later messages to the dead process.
        raise ClientError(
            f"round {ask.request.round_}: the process that trained client {client} died "
            f"({kind or printable(reason, 200)}); Flower's runtime does not replace it, so the run "
            "stops here: mend what killed it (memory?) and go on with resume, or use engine=ray, "
            "which replaces processes"
        )
