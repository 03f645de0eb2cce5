"""Pull replies from Flower's grid, and wait for their parts only until a deadline.

Flower 1.42 gives a reply out as soon as it is announced, and waits inside ``pull_messages`` for its
parts, for minutes if the node has gone meanwhile. `flower_patches` has it wait until `UNTIL`.
"""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

from fedraclora.engines.flower_patches import UNTIL

NOT_WHOLE = 3  # Flower's code for a reply whose parts have not come
LOOKS = 0.1  # seconds between looks for replies: each is a request


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
    """Return whether parts of a reply are missing."""
    return isinstance(reply, Message) and reply.has_error() and reply.error.code == NOT_WHOLE
