"""Messages as tests make and read them, outside a runtime of Flower's too."""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity

from fedraclora.protocol.downlink import Downlink
from fedraclora.wire.downlink import AskReader, AskWriter
from fedraclora.wire.exchange import DTYPES, Ask, TrainRequest
from fedraclora.wire.records import Content


def become_a_task() -> None:
    """Set what Flower's `Message` reads from a process-global that only its own runtime sets."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


def pack_downlink(downlink: Downlink, request: TrainRequest, dtype: str) -> Content:
    """Write a downlink for the clients of one request."""
    return AskWriter().write(Ask(request, downlink.to(DTYPES[dtype]), apart=True))


def unpack_downlink(content: Content) -> tuple[Downlink, TrainRequest]:
    """Read what one train message asks of its clients."""
    ask = AskReader().read(content)
    return ask.own, ask.request
