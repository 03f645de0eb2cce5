"""Push messages to Flower's grid, again if the SuperLink refuses a part of one.

Flower sends a request again if its answer was lost with the connection. The SuperLink has that part
by then and refuses it, and Flower 1.42 ends the push with an error that says the session may have
expired. The name of a message is a hash of it: the SuperLink keeps a message that is pushed
again once, and asks only for parts that it lacks.

If a part exceeds the size of a request that a proxy before the SuperLink accepts (HTTP 413), Flower
returns no name, and no error. Trying again does not help.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.serverapp import Grid

from fedraclora.errors import ClientError, EngineError
from fedraclora.flower_internals import part_sizes, push_refused

PUSHES = 3  # of one message: each answer would have to be lost


def pushed(grid: Grid, message: Message, who: str, incidents: list[str]) -> str:
    """Push a message; return Flower's number of it.

    Args:
        grid: Flower's own.
        message: To one node.
        who: The node or its clients, for messages to the operator.
        incidents: Where a message that had to be pushed again is recorded.

    Raises:
        ClientError: If the SuperLink refuses parts of it `PUSHES` times.
        EngineError: If a request is too large for the way to the SuperLink.
    """
    for left in reversed(range(PUSHES)):
        try:
            names = list(grid.push_messages([message]))
        except push_refused() as error:
            if not left:
                raise ClientError(
                    f"the SuperLink refused a message to {who} {PUSHES} times ({error}). Look at "
                    "the SuperLink's log for the reason: the connection between it and the run "
                    "breaks, or its database cannot be written"
                ) from error
            incidents.append(f"a message to {who} was pushed again: the SuperLink refused a part")
        else:
            if not names:
                raise EngineError(_too_large(message, who))
            return names[0]
    raise AssertionError


def _too_large(message: Message, who: str) -> str:
    """Say how large a message is that was refused for its size, and what to do."""
    sizes = part_sizes(message)
    return (
        f"a message to {who} is too large for the way to the SuperLink (HTTP 413): it has "
        f"{sum(sizes) / 1e6:.1f} MB, and its largest request {max(sizes) / 1e6:.1f} MB. A proxy "
        "between this run and the SuperLink accepts no request of that size. Raise its limit "
        f"(nginx: `client_max_body_size {max(sizes) // 2**20 + 2}m`), then resume the run"
    )
