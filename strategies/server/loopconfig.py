"""From the config of a run to the settings of its round loop."""

from __future__ import annotations

import torch

from fedraclora.config.build import BuiltTask
from fedraclora.config.run_config import RunConfig
from strategies.server.loop import LoopConfig


def loop_of(config: RunConfig, built: BuiltTask, chunk: int, dtype: torch.dtype) -> LoopConfig:
    """Build the loop's settings.

    Raises:
        ConfigError: If a round needs more replies than it asks clients.
    """
    return LoopConfig(
        rounds=config.rounds,
        clients=built.clients,
        cohort=built.cohort,
        chunk=chunk,
        seed=config.seed,
        weights=config.weights,
        dtype=str(dtype).removeprefix("torch."),
        uplink=config.wire.uplink,
        downlink=config.wire.downlink,
        feedback=config.wire.feedback,
        evaluate_every=config.evaluate.every,
        max_failures=config.max_failures,
        **vars(config.engine.waiting(built.cohort)),
    )
