"""Push messages to Flower's grid, again if the SuperLink refuses a part of one.

Flower sends a request again if its answer was lost with the connection. The SuperLink has that part
by then and refuses it, and Flower 1.42 ends the push with an error that says the session may have
expired. The name of a message is a hash of it: the SuperLink keeps a message that is pushed
again once, and asks only for parts that it lacks.
"""

from __future__ import annotations

from flwr.app import Message
from flwr.serverapp import Grid

from fedraclora.errors import ClientError
from fedraclora.flower_internals import push_refused

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
    """
    for left in reversed(range(PUSHES)):
        try:
            (name,) = grid.push_messages([message])
        except push_refused() as error:
            if not left:
                raise ClientError(
                    f"the SuperLink refused a message to {who} {PUSHES} times ({error}). Look at "
                    "the SuperLink's log for the reason: the connection between it and the run "
                    "breaks, or its database cannot be written"
                ) from error
            incidents.append(f"a message to {who} was pushed again: the SuperLink refused a part")
        else:
            return name
    raise AssertionError
