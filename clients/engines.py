"""The engines of `simulate`: in this process, and on Ray's workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fedraclora.clients.ray_worker import Site, SiteParts
from fedraclora.clients.worker import Worker
from fedraclora.config.run_config import RunConfig
from fedraclora.config.settings import DeployConfig, FlowerConfig, RayConfig
from fedraclora.data.held import files_of
from fedraclora.engines.base import Engine, EngineParts, Grid
from fedraclora.errors import ConfigError
from fedraclora.objects import named_by
from fedraclora.weights.update import BaseWeights, WeightHistory
from fedraclora.wire.exchange import Answer, Ask, Came, NoAnswer

if TYPE_CHECKING:  # Ray is imported where it is started
    from fedraclora.engines.ray import WorkerSite


Arrange = Callable[[list[tuple[Ask, Answer | NoAnswer]]], Came]


class InProcessGrid(Grid):
    """Asks clients of this process, one chunk after another.

    Args:
        worker: Trains them.
        arrange: Changes what comes, and its order (tests do); the order is that of the asks
            otherwise.
    """

    def __init__(self, worker: Worker, arrange: Arrange | None = None) -> None:
        super().__init__()
        self.worker, self.arrange = worker, arrange

    @override
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        # The time is not heeded: a client that hangs in this process hangs the process.
        came = ((ask, self._one(ask)) for ask in asks)  # each is read before the next is asked for
        return came if self.arrange is None else self.arrange([*came])

    def _one(self, ask: Ask) -> Answer | NoAnswer:
        try:
            return self.worker.train(ask)
        except Exception as error:
            return NoAnswer.of(error)


class InProcess(Engine):
    """Clients in this process, one chunk after another; they read the server's own weights.

    Args:
        arrange: Changes what comes; see `InProcessGrid`.
    """

    def __init__(self, arrange: Arrange | None = None) -> None:
        super().__init__(BaseWeights({}))
        self.arrange = arrange

    @override
    def make_grid(self, parts: EngineParts) -> Grid:
        return InProcessGrid(self.make_worker(parts), self.arrange)

    def make_worker(self, parts: EngineParts) -> Worker:
        """Make what answers the messages."""
        return Worker(parts.trainer, self.replica, parts.store, parts.terms)


class OnRay(Engine):
    """Chunks of clients on resident Ray workers, which follow the server's weights by links.

    Args:
        settings: How many workers, of which cluster.
        site: Makes what a worker holds between rounds; importable on every node.
        given: Gives what sites are made of; it travels once to each machine.
    """

    spread = True

    def __init__(
        self,
        settings: RayConfig,
        site: Callable[[Any], WorkerSite],
        given: Callable[[EngineParts], object],
    ) -> None:
        self.settings, self.site, self.given = settings, site, given
        self.share, self.history = settings.share, WeightHistory()
        super().__init__(self.history)

    @override
    def make_grid(self, parts: EngineParts) -> Grid:
        from fedraclora.engines.ray import Cluster, RayGrid

        with ExitStack() as failed:
            cluster = Cluster(self.settings, parts.built.device.type)
            failed.callback(cluster.close)
            files = files_of(parts.built.task.train)
            if files is not None and (without := cluster.lacking(here := Path(files.source or ""))):
                files.sizes(torch.arange(files.num_clients))  # read here, they travel as they are
                text = f"sent to all hosts, since {here} is not the same on {', '.join(without)}"
                cluster.told["samples"] = text
            grid = RayGrid(
                cluster,
                self.site,
                self.given(parts),
                history=self.history,
                store=parts.store,
                settings=self.settings,
            )
            failed.pop_all()
            return grid


def _parts_of(config: RunConfig, parts: EngineParts) -> SiteParts:
    """Collect what a worker is made of; data and model travel in the task."""
    judges = {key: config.data.get(key) for key in ("loss", "metrics")}
    own = {"local": config.plain.get("local"), **judges}
    return SiteParts(config, parts.built, parts.plan, named_by(own))


def engine_of(config: RunConfig) -> Engine:
    """Make the engine that a config names.

    Raises:
        ConfigError: If its clients are not this process's to start.
    """
    match config.engine:
        case DeployConfig():
            raise ConfigError(
                "engine=deploy is for real hosts: run `fedraclora deploy` with connection=NAME, "
                "or with local=3 for three nodes on this machine"
            )
        case RayConfig() as settings:
            return OnRay(settings, Site, partial(_parts_of, config))
        case FlowerConfig():
            raise ConfigError(
                "engine=flower is for Flower's own simulation: run `fedraclora flower` with the "
                "same words, or take engine=ray (many processes) or inline (this one; same bits)"
            )
        case _:
            return InProcess()
