"""The in-process engine: a Flower `Grid` whose one node is this process.

``vectorised`` sends chunks of many clients, ``inline`` chunks of one; the grid is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from typing_extensions import override

from fedraclora.engines.local import APP_RAISED, NODE_ID, LocalGrid, error_of, failed


class InProcessGrid(LocalGrid):
    """Runs a ClientApp in this process, one message after another.

    Args:
        app: The ClientApp.
        arrange: Changes the order of replies (tests shuffle them); they come in sending order
            otherwise.
    """

    def __init__(
        self, app: ClientApp, arrange: Callable[[list[Message]], list[Message]] | None = None
    ) -> None:
        super().__init__()
        self.app, self.arrange = app, arrange
        self.context = Context(
            run_id=1,
            node_id=NODE_ID,
            node_config={"partition-id": 0, "num-partitions": 1},
            state=RecordDict(),
            run_config={},
        )

    @override
    def answer(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        # The time is not heeded: a client that hangs in this process hangs the process.
        replies = map(self._one, messages)  # each is read before the next is asked for
        return replies if self.arrange is None else self.arrange([*replies])

    def _one(self, message: Message) -> Message:
        try:
            reply = self.app(message=message, context=self.context)
        except Exception as error:
            return failed(message, error_of(error))
        if not isinstance(reply, Message):
            return failed(message, Error(APP_RAISED, f"the ClientApp returned {type(reply)}"))
        return reply
