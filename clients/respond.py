"""Answers the messages of Flower's runtimes, in a process that may live on.

A message may meet any process, or a fresh one. A process builds data and model once and keeps
them. In a simulation the base weights follow those of the server by a folder of its machine; on
real hosts each client has its own (`fedraclora.clients.node`).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedraclora.clients import node
from fedraclora.clients.worker import Worker
from fedraclora.clients.worker_state import RequestHandler
from fedraclora.engines.records import APART, PART, folded, from_records, to_records, unfolded
from fedraclora.engines.replies import STALE, check_format, failed
from fedraclora.errors import StaleError, WireError
from fedraclora.weights.replica import FolderReplica, read_settings
from fedraclora.wire.records import clients_of, read_tree, tree_record


def respond(message: Message, context: Context) -> Message:
    """Answer a message; what goes wrong is an error reply."""
    reply = introduced if message.metadata.message_type == "query.partition" else trained
    try:
        return Message(reply(message.content, context), reply_to=message)
    except StaleError:
        return Message(RecordDict({STALE: ConfigRecord()}), reply_to=message)
    except Exception as error:
        return failed(message, error)


def introduced(content: RecordDict, context: Context) -> RecordDict:
    """Report which client this node is, or on a real host which it serves."""
    job = content.get("job")
    if isinstance(job, ConfigRecord):
        check_format(job.get("format"), "the server")
        return node.introduce(context, str(job["run"]))
    record = ConfigRecord({"id": int(context.node_config["partition-id"])})
    return RecordDict({"partition": record})


def trained(content: RecordDict, context: Context) -> RecordDict:
    """Train clients of this node.

    Raises:
        WireError: If the message does not say what to do.
    """
    job = content.get("job")
    if not isinstance(job, ConfigRecord):
        raise WireError(
            f"a message of the server has the records {list(content)}, but not the record job, "
            "which says what to do: run the server and the clients from one release"
        )
    if "run" in job:
        check_format(job.get("format"), "the server")
        content = unfolded(content)
        least = PART if len(clients_of(from_records(content))) > 1 else APART
        return folded(node.answer(context, str(job["run"]), content), least)
    asked = from_records(content)
    reply, stored = handler_of(str(job["folder"])).train(asked, read_tree(asked, "kept"))
    return to_records({**reply, "kept": tree_record(stored)})


@lru_cache(maxsize=1)
def handler_of(folder: str) -> RequestHandler:
    """Build data and model of a run, once in each process.

    Args:
        folder: Of a `fedraclora.weights.replica.JobFolder`.
    """
    trainer, terms = node.built_from(read_settings(Path(folder)))
    replica = FolderReplica(Path(folder), trainer.plan, trainer.device)
    return RequestHandler(Worker(trainer, replica, terms=terms))
