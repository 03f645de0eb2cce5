"""What grids that are no Flower runtime have in common: ids, replies, a run."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from typing_extensions import override

from fedraclora.errors import OF_THE_RUN, WireError

NODE_ID = 2  # 1 is the SuperLink's own id in Flower
# What Flower raises where the bytes of a message are no message.
UNREADABLE = (AttributeError, DecodeError, LookupError, RecursionError, TypeError, ValueError)
APP_RAISED = 2  # Flower's code for a ClientApp that raised
STALE = "stale"  # the record of a reply that asks for every base weight whole
RUN_AT_FAULT = 1000  # ours, far from Flower's: it raised what no client is to blame for


def become_a_task() -> None:
    """Let `Message` be built outside a Flower runtime.

    Flower 1.42 reads run and node id from a process-global that only its own runtime sets; this
    is the one place that touches it.
    """
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def error_of(raised: Exception) -> Error:
    """Convert an exception to Flower's own error of a reply; `OF_THE_RUN` has a code of its own."""
    code = RUN_AT_FAULT if isinstance(raised, OF_THE_RUN) else APP_RAISED
    return Error(code, f"{type(raised).__name__}: {raised}")


def failed(message: Message, error: Error) -> Message:
    """Build the reply to a message whose clients cannot be trained."""
    return Message(error, reply_to=message)


def taken_incidents(grid: Grid) -> dict[str, object]:
    """Take what went wrong and was mended in a grid, as a column of the ledger; {} if nothing."""
    incidents = list(getattr(grid, "incidents", ()))
    if not incidents:
        return {}
    grid.incidents.clear()  # type: ignore[attr-defined]
    return {"incidents": incidents}


def is_stale(reply: Message) -> bool:
    """Check whether a client asks for every base weight whole."""
    return not reply.has_error() and STALE in reply.content


class MessageGrid(Grid):
    """A grid of one node, whose messages are made as everywhere, and which can be ended.

    Messages that are pushed are answered at once; who pulls gets the replies.
    """

    def __init__(self) -> None:
        self._replies: dict[str, Message] = {}

    def close(self) -> None:
        """End what the grid has started."""

    @override
    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @override
    def get_node_ids(self) -> Iterable[int]:
        return [NODE_ID]

    @override
    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = list(messages)
        for reply in self.send_and_receive(pushed):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in pushed]

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]


class LocalGrid(MessageGrid):
    """A grid in this process; subclasses say how messages are answered.

    Attributes:
        incidents: What went wrong and was mended since the strategy last looked: sentences for
            the ledger.
    """

    def __init__(self) -> None:
        super().__init__()
        become_a_task()
        self.incidents: list[str] = []
        self._ids = itertools.count(1)
        self._run: Run | None = None

    @abstractmethod
    def answer(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        """Answer messages, each with its id set.

        Args:
            messages: Instructions.
            timeout: Seconds for all of them, or None.

        Returns:
            Replies, in any order.
        """

    @override
    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    @override
    def run(self) -> Run:
        if self._run is None:
            raise WireError("this grid serves no Flower run")
        return self._run

    @override
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        for message in sent:
            # The id that a SuperLink would give; Flower has no public setter.
            message.metadata.__dict__["_message_id"] = str(next(self._ids))
        return self.answer(sent, timeout)
