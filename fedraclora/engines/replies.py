"""Replies of Flower that say why there is none; light, since thin processes import it."""

from __future__ import annotations

from flwr.app import Error, Message
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fedraclora.errors import OF_THE_RUN

# What Flower raises where the bytes of a message are no message.
UNREADABLE = (AttributeError, DecodeError, LookupError, RecursionError, TypeError, ValueError)
APP_RAISED = 2  # Flower's code for a ClientApp that raised
RUN_AT_FAULT = 1000  # ours, far from Flower's: it raised what no client is to blame for
STALE = "stale"  # the record of a reply that asks for every base weight whole


def failed(message: Message, raised: Exception) -> Message:
    """Build the reply to a message whose clients cannot be trained."""
    code = RUN_AT_FAULT if isinstance(raised, OF_THE_RUN) else APP_RAISED
    return Message(Error(code, f"{type(raised).__name__}: {raised}"), reply_to=message)


def is_stale(reply: Message) -> bool:
    """Check whether a client asks for every base weight whole."""
    return not reply.has_error() and STALE in reply.content
