"""What a resident worker of another process holds: model, data, base weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedraclora.clients.worker import Worker
from fedraclora.config.build import BuiltTask, fix_bits, terms_of, trainer_of
from fedraclora.config.run_config import TaskConfig
from fedraclora.objects import lend
from fedraclora.protocol.method import Plan
from fedraclora.protocol.named import Named, of_main
from fedraclora.run.client_state import ClientStore
from fedraclora.tree import Tree, fingerprint, weights_of
from fedraclora.trust import trust, trusted
from fedraclora.weights.replica import Replica
from fedraclora.wire.downlink import AskReader
from fedraclora.wire.records import Content
from fedraclora.wire.reply import write_answer


@dataclass(frozen=True)
class WorkerParts:
    """What a `WorkerState` is made of; it travels once to each machine, data included."""

    config: TaskConfig
    built: BuiltTask
    plan: Plan
    lent: Mapping[str, Any] = field(default_factory=dict)  # objects of the program, by name
    trusted: Sequence[str] = field(default_factory=trusted)  # modules, where the run was started
    named: Sequence[type[Named]] = field(default_factory=of_main)  # of the main program


class RequestHandler:
    """Answers the messages of clients whose own tensors come with them.

    Args:
        worker: Trains; what it keeps itself is not used.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker, self._reader = worker, AskReader()

    def train(self, content: Content, stored: Tree) -> tuple[Content, Tree]:
        """Answer a message.

        Args:
            content: The message.
            stored: What its clients hold (`fedraclora.run.client_state.ClientStore.part`).

        Returns:
            The reply, and what was kept in this round.
        """
        store = self.worker.store = ClientStore()
        store.restore(stored)
        ask = self._reader.read(content)
        reply = write_answer(self.worker.train(ask))
        return reply, store.since(ask.request.round_)


class WorkerState(RequestHandler):
    """Trains clients on a replica that follows the server's."""

    def __init__(self, parts: WorkerParts) -> None:
        trust(parts.trusted)
        for kind in parts.named:
            kind.register()
        for name, thing in parts.lent.items():
            lend(thing, name)
        fix_bits(parts.config.engine.threads, parts.built.device)
        self.replica = Replica(parts.plan, parts.built.device)
        base = weights_of(parts.built.task.model)  # the server's, if it begins with them
        self.replica.take(base, 0, fingerprint(base))
        trainer = trainer_of(parts.config, parts.built, parts.plan)
        super().__init__(Worker(trainer, self.replica, terms=terms_of(parts.config, parts.built)))
