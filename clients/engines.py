"""Create the engines of `simulate`: in this process, and on Ray's workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fedraclora.clients.worker import Worker
from fedraclora.clients.worker_state import WorkerState
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.settings import DeployConfig, RayConfig
from fedraclora.engines.base import Engine, Grid
from fedraclora.errors import ConfigError
from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.run.client_state import ClientStore
from fedraclora.training.cohort import CohortTrainer
from fedraclora.weights.update import BaseWeights, WeightHistory
from fedraclora.wire.answers import Answer, Came, NoAnswer
from fedraclora.wire.exchange import Ask

if TYPE_CHECKING:  # Ray is imported where it is started
    from fedraclora.engines.ray import WorkerStateLike


class InProcessGrid(Grid):
    """Ask clients in this process, one chunk after another.

    Args:
        worker: Trains them.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self.worker = worker

    @override
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        # The timeout is not used: a client that hangs in this process hangs the process.
        return ((ask, self._one(ask)) for ask in asks)  # each reply is read before the next request

    def _one(self, ask: Ask) -> Answer | NoAnswer:
        try:
            return self.worker.train(ask)
        except Exception as error:
            return NoAnswer.of(error)


def in_process() -> Engine:
    """Build the engine that trains clients in this process, on the server's own weights."""
    weights = BaseWeights({})

    def make_grid(trainer: CohortTrainer, store: ClientStore, terms: SecAggTerms | None) -> Grid:
        return InProcessGrid(Worker(trainer, weights, store, terms))

    return Engine(weights, make_grid)


def on_ray(
    settings: RayConfig,
    state: Callable[[Any], WorkerStateLike],
    given: object,
) -> Engine:
    """Create the engine of resident Ray workers, which follow the server's weights by updates.

    Args:
        settings: How many workers, of which cluster.
        state: Creates a worker's state; importable on every node.
        given: Arguments of the state, sent once to each machine.
    """
    history = WeightHistory()

    def make_grid(trainer: CohortTrainer, store: ClientStore, _: SecAggTerms | None) -> Grid:
        from fedraclora.engines.ray import Cluster, RayGrid

        with ExitStack() as failed:
            cluster = Cluster(settings, trainer.device.type)
            failed.callback(cluster.close)
            data = trainer.task.train
            here = data.folder
            if here is not None and (without := cluster.lacking(here)):
                # read here, so that they are sent unchanged
                data.sizes(torch.arange(data.num_clients))
                text = f"sent to all hosts, since {here} is not the same on {', '.join(without)}"
                cluster.facts["samples"] = text
            grid = RayGrid(cluster, state, given, history=history, store=store, settings=settings)
            failed.pop_all()
            return grid

    return Engine(history, make_grid, spread=True, share=settings.share)


def engine_of(builder: TaskBuilder) -> Engine:
    """Create the engine that a run's config names.

    Raises:
        ConfigError: If its clients cannot be started by this process.
    """
    match builder.config.engine:
        case DeployConfig():
            raise ConfigError(
                "engine=deploy: `fedraclora simulate` cannot start real hosts. Run "
                "`fedraclora deploy` with connection=NAME, or with nodes=3 for three nodes "
                "on this machine"
            )
        case RayConfig() as settings:
            return on_ray(settings, WorkerState, builder)
        case _:
            return in_process()
