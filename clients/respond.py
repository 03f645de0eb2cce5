"""Answer messages of a deployment, in a resident process (`clients.node`)."""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedraclora.clients import node
from fedraclora.engines.records import APART, PART, clients_of, folded, unfolded
from fedraclora.engines.replies import check_format, failed
from fedraclora.errors import WireError


def respond(message: Message, context: Context) -> Message:
    """Answer a message; a failure becomes an error reply."""
    introduced = message.metadata.message_type == "query.partition"
    try:
        content, run = message.content, run_of(message.content)
        reply = node.introduce(context, run) if introduced else trained(content, context, run)
        return Message(reply, reply_to=message)
    except Exception as error:
        return failed(message, error)


def run_of(content: RecordDict) -> str:
    """Return the id of the run of a message.

    Raises:
        WireError: If it names none, or comes from a release with other messages.
    """
    job = content.get("job")
    if not isinstance(job, ConfigRecord) or "run" not in job:
        raise WireError(
            f"the server sent the records {list(content)}, without the record job that names "
            "its run. Run the server and the clients from one release"
        )
    check_format(job.get("format"), "the server")
    return str(job["run"])


def trained(content: RecordDict, context: Context, run: str) -> RecordDict:
    """Train clients of this node."""
    content = unfolded(content)
    least = PART if len(clients_of(content)) > 1 else APART
    return folded(node.answer(context, run, content), least)
