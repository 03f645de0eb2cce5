"""The base of grids inside a ServerApp: they send requests as messages of Flower's own grid."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid as FlowerGrid

from fedraclora.engines.asks import AskWriter
from fedraclora.engines.base import Grid
from fedraclora.engines.replies import RUN_AT_FAULT
from fedraclora.errors import EngineError
from fedraclora.wire.answers import NoAnswer
from fedraclora.wire.exchange import Ask

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WRAPPED = ("ClientAppException", "RayTaskError")
RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit)\b.*)$", re.MULTILINE)


def last_raised(reason: str) -> str:
    r"""Shorten Flower's report of a failed app, in Ray a whole traceback, to its last error.

    Example:
        >>> last_raised("<class 'E'>:<'Traceback:\nOSError: full\n\nClientAppException: '>")
        'OSError: full'
        >>> last_raised("no reply in time")
        'no reply in time'
    """
    found = [line for line in RAISED.findall(ANSI.sub("", reason)) if not line.startswith(WRAPPED)]
    return found[-1] if found and "Traceback" in reason else reason


class PostedGrid(Grid):
    """Send requests through Flower's own grid; subclasses choose the nodes and the way.

    Args:
        grid: Flower's own.
        ended: Tells whether the runtime has ended, so that no reply will arrive.
        pause: Seconds between polls for replies.
        search: Which rate of a search it tries, so that a node tells its rounds from the run's;
            empty for the run's own.

    Attributes:
        kind: Type of its messages.
    """

    kind = "train.cohort"

    def __init__(
        self, grid: FlowerGrid, *, ended: Callable[[], bool], pause: float, search: str = ""
    ) -> None:
        super().__init__()
        self.grid, self.ended, self.pause = grid, ended, pause
        self.search = search
        self._writer = AskWriter()

    def message(self, ask: Ask, node: int, more: RecordDict, ttl: float) -> Message:
        """Write a request as a message.

        Args:
            ask: The request.
            node: The target node.
            more: Further records.
            ttl: Seconds after which the message expires, so that it is not trained hours later.
        """
        content = RecordDict({**self._writer.write(ask), **more})
        number = ask.request.round_
        round_ = f"{number} of search {self.search}" if self.search else str(number)
        return Message(content, node, self.kind, group_id=round_, ttl=ttl)

    @staticmethod
    def refusal(reply: Message) -> NoAnswer:
        """Return the reason of an error reply."""
        return NoAnswer(last_raised(str(reply.error.reason)), reply.error.code == RUN_AT_FAULT)

    def wait(self, what: str) -> None:
        """Wait a moment, and check that the runtime is alive.

        Args:
            what: What is waited for, for the message.

        Raises:
            EngineError: If the runtime has ended.
        """
        time.sleep(self.pause)
        if self.ended():
            raise EngineError(
                f"Flower's runtime ended before {what}. See Flower's log, then resume the run"
            )
