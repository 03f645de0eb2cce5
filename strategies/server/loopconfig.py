"""From the config of a run to the settings of its round loop."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.build import BuiltTask
from fedraclora.config import RunConfig
from fedraclora.errors import ConfigError
from fedraclora.settings import DeployConfig, FlowerConfig
from strategies.server.loop import LoopConfig


def loop_of(config: RunConfig, built: BuiltTask, chunk: int, dtype: torch.dtype) -> LoopConfig:
    """Give what the loop must know."""
    engine = config.engine
    loop = LoopConfig(
        rounds=config.rounds,
        clients=built.clients,
        cohort=built.cohort,
        chunk=chunk,
        seed=config.seed,
        weights=config.weights,
        dtype=str(dtype).removeprefix("torch."),
        evaluate_every=config.evaluate.every,
        max_failures=config.max_failures,
        # Ray's workers have a limit for each chunk, and in this process nobody is waited for.
        timeout=engine.timeout if isinstance(engine, FlowerConfig | DeployConfig) else None,
    )
    if not isinstance(engine, DeployConfig):
        return loop
    if (engine.min_clients or 1) > built.cohort:
        raise ConfigError(
            f"engine.min_clients is {engine.min_clients}, but a round asks {built.cohort} clients"
        )
    return replace(
        loop,
        guarded=True,
        min_clients=engine.min_clients,
        max_samples=engine.max_samples,
        retries=engine.retries,
    )
