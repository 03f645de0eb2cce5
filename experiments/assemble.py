"""Puts a run together, on the engine that its config names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clients.app import make_client_app
from clients.site import Site, SiteParts
from clients.worker import Worker
from fedraclora.build import terms_of
from fedraclora.config import RunConfig
from fedraclora.engines.inprocess import InProcessGrid
from fedraclora.errors import ConfigError
from fedraclora.job import JobFolder
from fedraclora.replica import Chronicle, Replica
from fedraclora.settings import DeployConfig, FlowerConfig, RayConfig
from strategies import assembly
from strategies.assembly import Assembled, Crew, RunGrid
from strategies.server.rows import Row

__all__ = ["Assembled", "assemble"]


def assemble(
    config: RunConfig,
    folder: Path | None,
    *,
    resume: bool = False,
    on_round: Callable[[Row], None] | None = None,
) -> Assembled:
    """Build every part of a run; see `strategies.assembly.assemble`."""
    replica = make_replica(config)
    return assembly.assemble(config, folder, replica, make_grid, resume=resume, on_round=on_round)


def make_replica(config: RunConfig) -> Replica:
    """Make the place where the engine's workers find the base weights.

    Raises:
        ConfigError: If they are not this machine's to start.
    """
    if isinstance(config.engine, DeployConfig):
        raise ConfigError("engine=deploy is for fedraclora deploy, with connection=NAME or local=3")
    if isinstance(config.engine, RayConfig):
        return Chronicle()
    if isinstance(config.engine, FlowerConfig):
        return JobFolder(config.plain)
    return Replica({})


def make_grid(crew: Crew) -> RunGrid:
    """Start what runs clients.

    Raises:
        FedRacLoraError: If it does not start, or there is less than is asked for.
    """
    config, built, replica = crew.config, crew.built, crew.replica
    if isinstance(replica, Chronicle) and isinstance(config.engine, RayConfig):
        from fedraclora.engines.ray import Cluster, RayGrid

        return RayGrid(
            Cluster(config.engine, built.device.type),
            Site,
            SiteParts(config, built, crew.plan),
            chronicle=replica,
            store=crew.store,
            settings=config.engine,
        )
    if isinstance(replica, JobFolder) and isinstance(config.engine, FlowerConfig):
        from clients.client_app import app
        from fedraclora.engines.flower import FlowerGrid

        return FlowerGrid(
            app,
            replica,
            clients=built.clients,
            store=crew.store,
            settings=config.engine,
            device=built.device.type,
        )
    worker = Worker(crew.trainer, replica, crew.store, terms_of(crew.config, built))
    return InProcessGrid(make_client_app(worker))
