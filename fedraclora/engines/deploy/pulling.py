"""Replies pulled from Flower's grid, whose parts are waited for no longer than somebody wants them.

Flower 1.42 gives a reply out as soon as it is announced. It then waits inside ``pull_messages`` for
its parts, with pauses of a second and more, until none has come for three minutes; no option
changes that. What pulls them takes such options, and is replaced in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import pull_objects

NOT_WHOLE = 3  # Flower's code for a reply whose parts have not come
LOOKS = 0.1  # seconds between looks for replies: each is a request
LONGEST = 2.0  # seconds between looks for a part, and by which a reply is waited for too long
UNTIL = ContextVar("UNTIL", default=math.inf)


def pulled(grid: Grid, names: Iterable[str], until: float) -> list[Message]:
    """Pull the replies that have arrived.

    Args:
        grid: Flower's own.
        names: Flower's numbers of the messages that they answer.
        until: When a reply without all of its parts becomes an error (`NOT_WHOLE`), as
            `time.monotonic` has it; one whose parts are there is read even then.
    """
    token = UNTIL.set(until)
    try:
        return list(grid.pull_messages(list(names)))
    finally:
        UNTIL.reset(token)


def in_part(reply: object) -> bool:
    """Tell whether parts of a reply have not come."""
    return isinstance(reply, Message) and reply.has_error() and reply.error.code == NOT_WHOLE


def pull_parts(**named: Any) -> dict[str, bytes]:
    """Pull the parts of a reply; ``named`` is what Flower names of its `pull_objects`."""
    seconds = max(0.0, UNTIL.get() - time.monotonic())
    pauses: dict[str, Any] = {"initial_backoff": LOOKS, "backoff_cap": LONGEST}
    return pull_objects(**named, **pauses, max_time=seconds, max_tries_per_object=None)


def pull_in_time() -> None:
    """Let Flower's grid pull parts so, in this process."""
    from flwr.superlink.grid import http_grid

    http_grid.pull_objects = pull_parts  # type: ignore[assignment,attr-defined]
