"""A grid without Flower's runtime."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from typing_extensions import override


def become_a_task() -> None:
    """Set what Flower's `Message` reads from a process-global that only its own runtime sets."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


class FakeGrid(Grid):
    """Stands for Flower's grid in this process; who derives from it delivers messages.

    Attributes:
        nodes: By id.
        ids: Of messages.
        waiting: Messages that are not pulled yet, by id.
    """

    nodes: dict[int, Any]

    def __post_init__(self) -> None:
        become_a_task()
        self.ids = itertools.count(1)
        self.waiting: dict[str, Message] = {}

    @override
    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    @override
    def run(self) -> None:  # type: ignore[override]
        raise NotImplementedError

    @override
    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    @override
    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    @override
    def send_and_receive(self, messages: object, *, timeout: object = None) -> list[Message]:
        raise NotImplementedError
