"""Lets a test make Flower's messages outside a runtime of Flower's."""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity


def become_a_task() -> None:
    """Set what `Message` reads from a process-global that only Flower's own runtime sets."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
