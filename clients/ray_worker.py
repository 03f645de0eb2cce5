"""What a resident worker of another process holds: model, data, base weights."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import RecordDict

from fedraclora.clients.worker import Worker
from fedraclora.config.build import BuiltTask, fix_bits, terms_of, trainer_of
from fedraclora.config.run_config import TaskConfig
from fedraclora.protocol.method import Plan
from fedraclora.run.client_state import ClientStore
from fedraclora.tree import Tree
from fedraclora.weights.replica import Replica
from fedraclora.wire.records import round_of


@dataclass(frozen=True)
class SiteParts:
    """What a `Site` is made of; it travels once to each machine, data included."""

    config: TaskConfig
    built: BuiltTask
    plan: Plan


class Site:
    """Trains clients on a replica that follows the server's."""

    def __init__(self, parts: SiteParts) -> None:
        fix_bits(parts.config.engine.threads, parts.built.device)
        self.replica = Replica(parts.plan, parts.built.device)
        trainer = trainer_of(parts.config, parts.built, parts.plan)
        self.worker = Worker(trainer, self.replica, terms=terms_of(parts.config, parts.built))

    def train(self, content: RecordDict, stored: Tree) -> tuple[RecordDict, Tree]:
        """Answer a train message; see `answer`."""
        return answer(self.worker, content, stored)


def answer(worker: Worker, content: RecordDict, stored: Tree) -> tuple[RecordDict, Tree]:
    """Answer a train message of clients whose own tensors come with it.

    Args:
        worker: Trains; what it keeps itself is not used.
        content: The message.
        stored: What its clients hold (`fedraclora.run.client_state.ClientStore.part`).

    Returns:
        The reply, and what was kept in this round.
    """
    store = worker.store = ClientStore()
    store.restore(stored)
    reply = worker.train(content)
    return reply, store.since(round_of(content))
