"""The in-process engine: a Flower `Grid` whose one node is this process.

``vectorised`` sends chunks of many clients, ``inline`` chunks of one; the grid is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from typing_extensions import override

from fedraclora.errors import WireError

NODE_ID = 2  # 1 is the SuperLink's own id in Flower


def become_a_task() -> None:
    """Let `Message` be built outside a Flower runtime.

    Flower 1.42 reads run and node id from a process-global that only its own runtime sets; this
    is the one place that touches it.
    """
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class InProcessGrid(Grid):
    """Runs a ClientApp in this process, one message after another.

    Args:
        app: The ClientApp.
        arrange: Changes the order of replies (tests shuffle them); they come in sending order
            otherwise.
    """

    def __init__(
        self, app: ClientApp, arrange: Callable[[list[Message]], list[Message]] | None = None
    ) -> None:
        become_a_task()
        self.app, self.arrange = app, arrange
        self.context = Context(
            run_id=1,
            node_id=NODE_ID,
            node_config={"partition-id": 0, "num-partitions": 1},
            state=RecordDict(),
            run_config={},
        )
        self._ids = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._run: Run | None = None

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
        pushed = []
        for message in messages:
            reply = self._answer(message)
            self._replies[message.metadata.message_id] = reply
            pushed.append(message.metadata.message_id)
        return pushed

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    @override
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = [self._answer(message) for message in messages]
        return replies if self.arrange is None else self.arrange(replies)

    def _answer(self, message: Message) -> Message:
        # The grid gives the id that a SuperLink would give; Flower has no public setter.
        message.metadata.__dict__["_message_id"] = str(next(self._ids))
        try:
            reply = self.app(message=message, context=self.context)
        except Exception as error:  # the same shape as Flower's own error replies
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        if not isinstance(reply, Message):
            return Message(Error(2, f"the ClientApp returned {type(reply)}"), reply_to=message)
        return reply
