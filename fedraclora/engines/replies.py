"""Build and recognize error replies of Flower; a light module, since thin processes import it."""

from __future__ import annotations

from flwr.app import Error, Message
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedraclora.errors import OF_THE_RUN, WireError

# What Flower raises where the bytes of a message are no message.
UNREADABLE = (AttributeError, DecodeError, LookupError, RecursionError, TypeError, ValueError)
APP_RAISED = 2  # Flower's code for a ClientApp that raised
RUN_AT_FAULT = 1000  # ours, far from Flower's: it raised what no client is to blame for
FORMAT = 3  # of messages on real hosts: an answer says which of four kinds it is
STALE = "stale"  # the record of a reply that asks for every base weight whole


def check_format(found: object, who: str) -> None:
    """Reject a machine whose messages are of another format.

    Args:
        found: What it says of them; releases before the second format say nothing.
        who: It is, to begin the sentence.

    Raises:
        WireError: If it is another.
    """
    if found != FORMAT:
        came = 1 if found is None else found
        raise WireError(
            f"{who} writes messages of format {came!r:.20}, expected format {FORMAT}. Run the "
            "server and the nodes from one release of fedraclora"
        )


def failed(message: Message, raised: Exception) -> Message:
    """Build the reply to a message whose clients cannot be trained."""
    code = RUN_AT_FAULT if isinstance(raised, OF_THE_RUN) else APP_RAISED
    return Message(Error(code, f"{type(raised).__name__}: {raised}"), reply_to=message)


def is_stale(reply: Message) -> bool:
    """Check whether a client asks for every base weight whole."""
    return not reply.has_error() and STALE in reply.content
