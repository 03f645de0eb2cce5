"""Hold the state of a worker process: model, data, base weights."""

from __future__ import annotations

from fedraclora.clients.worker import Worker
from fedraclora.config.builder import TaskBuilder
from fedraclora.run.client_state import ClientStore
from fedraclora.tree import Tree, fingerprint, weights_of
from fedraclora.weights.replica import Replica
from fedraclora.wire.answers import Answer
from fedraclora.wire.exchange import Ask


class RequestHandler:
    """Answer requests that bring the state of their clients.

    Args:
        worker: Trains; what it keeps itself is not used.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def train(self, ask: Ask, stored: Tree) -> tuple[Answer, Tree]:
        """Answer a request.

        Args:
            ask: The request.
            stored: The clients' state (`fedraclora.run.client_state.ClientStore.part`).

        Returns:
            The reply, and the state stored in this round.
        """
        store = self.worker.store = ClientStore()
        store.restore(stored)
        answer = self.worker.train(ask)
        return answer, store.since(ask.request.round_)


class WorkerState(RequestHandler):
    """Train clients on a replica that follows the server's.

    Args:
        builder: Builds task and trainer; it is sent once to each machine, with the data.
    """

    def __init__(self, builder: TaskBuilder) -> None:
        builder.fix_bits()
        self.replica = Replica(builder.plan, builder.built.device)
        # the server's version, if it begins with these weights
        base = weights_of(builder.task.model)
        self.replica.take(base, 0, fingerprint(base))
        super().__init__(Worker(builder.trainer, self.replica, terms=builder.terms))
