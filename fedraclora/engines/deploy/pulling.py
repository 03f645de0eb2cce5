"""Pull replies from Flower's grid, and wait for their parts only until a deadline.

Flower 1.42 returns a reply as soon as it is announced, and waits inside ``pull_messages`` for its
parts, for minutes if the node has disconnected. `flower_patches` makes it wait only until `UNTIL`.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedraclora.engines.flower_patches import UNTIL
from fedraclora.flower_internals import error_code

NOT_WHOLE = error_code("MESSAGE_UNAVAILABLE")  # Flower's code for a reply with missing parts
LOOKS = 0.1  # seconds between polls for replies: each is a request


def pulled(grid: Grid, names: Iterable[str], until: float) -> list[Message]:
    """Pull the replies that have arrived.

    Args:
        grid: Flower's own.
        names: Flower's numbers of the messages that they answer.
        until: The time, by `time.monotonic`, after which a reply with missing parts becomes an
            error (`NOT_WHOLE`); a complete one is read even then.
    """
    token = UNTIL.set(until)
    try:
        return list(grid.pull_messages(list(names)))
    finally:
        UNTIL.reset(token)


def in_part(reply: object) -> bool:
    """Return whether parts of a reply are missing."""
    return isinstance(reply, Message) and reply.has_error() and reply.error.code == NOT_WHOLE
