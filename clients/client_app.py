"""Define the ClientApp of a SuperNode; light, since Flower starts a process for every message.

It passes a message to the resident process of the node (`clients.handover`), so that it needs no
slow imports.
"""

from __future__ import annotations

import os

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedraclora.clients.handover import hand_over
from fedraclora.engines.replies import failed

app = ClientApp()


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Report which clients this node serves."""
    return answer(message, context)


@app.train("cohort")
def train(message: Message, context: Context) -> Message:
    """Train clients of this node; a failure becomes an error of one line."""
    # The state of the context is not used: Flower drops it when a client raises.
    return answer(message, context)


def answer(message: Message, context: Context) -> Message:
    """Answer a message, by the resident process of the node or by this one."""
    job = message.content.get("job")
    # Without pidfd (Linux only) no process could be sure to end with its node.
    if isinstance(job, ConfigRecord) and "run" in job and hasattr(os, "pidfd_open"):
        try:
            return hand_over(message, context)
        except Exception as error:
            return failed(message, error)
    from fedraclora.clients.respond import respond

    return respond(message, context)
