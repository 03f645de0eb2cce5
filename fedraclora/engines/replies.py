"""Build and recognize error replies of Flower; a light module, since thin processes import it."""

from __future__ import annotations

from flwr.app import Error, Message
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedraclora.errors import OF_THE_RUN, WireError
from fedraclora.flower_internals import error_code

# Errors of Flower for bytes that are no message.
UNREADABLE = (AttributeError, DecodeError, LookupError, RecursionError, TypeError, ValueError)
APP_RAISED = error_code("CLIENT_APP_RAISED_EXCEPTION")  # Flower's code for an error in a ClientApp
RUN_AT_FAULT = 1000  # our code, far from Flower's: an error that is no client's fault
OWNER_REFUSES = 1001  # our code for a message that the owner of a node's data refuses
FORMAT = 3  # version of messages on real hosts: a reply names one of four kinds
RECORDS = "records"  # the key of the small records of a message, in its record `job`
STALE = "stale"  # the record of a reply that requests all full base weights


def check_format(found: object, who: str) -> None:
    """Check that a machine uses the same format of messages.

    Args:
        found: Its format; releases before the second format do not state it.
        who: Its name, to begin the sentence.

    Raises:
        WireError: If the format differs.
    """
    if found != FORMAT:
        came = 1 if found is None else found
        raise WireError(
            f"{who} writes messages of format {came!r:.20}, expected format {FORMAT}. Run the "
            "server and the nodes from one release of fedraclora"
        )


def failed(message: Message, raised: Exception) -> Message:
    """Build the reply to a message whose clients cannot train."""
    code = RUN_AT_FAULT if isinstance(raised, OF_THE_RUN) else APP_RAISED
    return Message(Error(code, f"{type(raised).__name__}: {raised}"), reply_to=message)


def is_stale(reply: Message) -> bool:
    """Check whether a client requests all full base weights."""
    return not reply.has_error() and STALE in reply.content
