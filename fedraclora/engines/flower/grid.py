"""Flower's simulation runtime as an engine: it starts when the first client is asked."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from flwr.clientapp import ClientApp
from typing_extensions import override

from fedraclora.config.settings import FlowerConfig
from fedraclora.engines.flower.nodes import NodePerClient
from fedraclora.engines.flower.runtime import Backend, Runtime
from fedraclora.engines.flower.superlink import Options
from fedraclora.engines.private_ray import cpus
from fedraclora.errors import ConfigError, EngineError
from fedraclora.run.client_state import ClientStore
from fedraclora.weights.job import JobFolder


def backend(settings: FlowerConfig, device: str) -> Backend:
    """Check what is asked for, and write it as Flower wants it.

    Raises:
        ConfigError: If this machine cannot give it.
    """
    served = min(32, (os.cpu_count() or 1) + 4)  # threads of the executor that Flower makes
    workers = min(cpus(), served) if settings.workers is None else settings.workers
    if workers > served:
        raise ConfigError(
            f"engine.workers is {workers}, but Flower serves at most {served} processes at a time "
            "on this machine: lower it, or use engine=ray"
        )
    share = float(device == "cuda") if settings.gpus is None else settings.gpus
    if share > (there := torch.cuda.device_count()):
        raise ConfigError(
            f"engine.gpus is {share:g} for each process, but this machine has {there} GPU(s): "
            "lower it, or set device=cpu and engine.gpus=null"
        )
    return {
        "init_args": {
            "address": "local",  # never the cluster of RAY_ADDRESS
            "num_cpus": workers,
            "include_dashboard": False,
            "configure_logging": False,
            "logging_level": "ERROR",
            "log_to_driver": False,
        },
        "client_resources": {
            "num_cpus": 1,
            "num_gpus": share,
            # Handed to Ray as they are: it replaces a dead process and does its task again. Flower
            # puts a dead one on top of its pool, where it fails nearly everything from there on.
            "max_restarts": -1,
            "max_task_retries": settings.retries,
        },
    }


def run_options(settings: FlowerConfig, device: str, clients: int) -> Options:
    """Write the same for ``flwr run``, which has words for a part of it.

    Raises:
        ConfigError: If this machine cannot give it.
    """
    config = backend(settings, device)
    init, resources = config["init_args"], config["client_resources"]
    return {
        "num-supernodes": clients,
        "client-resources-num-cpus": resources["num_cpus"],
        "client-resources-num-gpus": resources["num_gpus"],
        "init-args-num-cpus": init["num_cpus"],
        "init-args-logging-level": init["logging_level"],
        "init-args-log-to-driver": init["log_to_driver"],
    }


class FlowerGrid(NodePerClient):
    """The grid of a simulation runtime that this process starts and ends.

    Args:
        app: The ClientApp. Its functions are importable, so that processes keep what they built.
        job: Where client processes find settings and base weights; removed at the end.
        clients: Size of the population.
        store: What clients keep between rounds.
        settings: Processes, retries, time-out.
        device: Where clients train: cpu or cuda.

    Raises:
        ConfigError: If this machine cannot give the resources that are asked for.
    """

    def __init__(
        self,
        app: ClientApp,
        job: JobFolder,
        *,
        clients: int,
        store: ClientStore,
        settings: FlowerConfig,
        device: str,
    ) -> None:
        self.runtime = Runtime(app, clients, backend(settings, device))
        super().__init__(
            self.runtime.grid,
            clients,
            job,
            store=store,
            timeout=settings.timeout,
            ended=self.runtime.ended.is_set,
            mends=True,
        )

    @override
    def get_node_ids(self) -> Iterable[int]:
        from fedraclora.engines.ray.session import refuse_open_ray

        if not self._nodes:
            super().get_node_ids()
            refuse_open_ray()  # once processes have answered
        return self._nodes

    @override
    def wait(self, what: str) -> None:
        self.runtime.keep_sigterm()
        try:
            super().wait(what)
        except EngineError as error:
            raise self.runtime.error() or error from None

    @override
    def close(self) -> None:
        self.runtime.close()
        super().close()
