"""Settings of the round loop, and how they come from the config of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedraclora.config.build import BuiltTask
from fedraclora.config.run_config import RunConfig
from fedraclora.config.settings import WaitPolicy
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.quantised import FULL
from fedraclora.protocol.uplinks import SUM_BLOCK


@dataclass(frozen=True)
class LoopConfig(WaitPolicy):
    """Settings of the round loop.

    Attributes:
        rounds: Rounds to run in all.
        clients: Size of the population.
        cohort: Clients per round.
        chunk: Clients per ask.
        seed: Of the run.
        weights: ``examples`` or ``uniform``.
        dtype: Of numbers on the wire, that of the base weights.
        uplink, downlink: How they travel: as they are, or rounded to fewer bits
            (`fedraclora.protocol.quantised`).
        feedback: Whether clients keep what rounding left (`fedraclora.wire.feedback`).
        uplink_coding, downlink_coding: How what is in fewer bits is coded
            (`fedraclora.protocol.coding`).
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        max_failures: Clients that may fail in a round before the run stops.
    """

    rounds: int
    clients: int
    cohort: int
    chunk: int
    seed: int
    weights: str = "samples"
    dtype: str = "float32"
    uplink: str = FULL
    downlink: str = FULL
    feedback: bool = False
    uplink_coding: str = NONE
    downlink_coding: str = NONE
    evaluate_every: int = 1
    max_failures: int = 0

    def allowed(self, cohort: int) -> int:
        """How many clients of a cohort may fail."""
        if not self.untrusted:
            return self.max_failures
        return cohort - min(self.min_clients or cohort, cohort)

    @property
    def kinds(self) -> tuple[str, str]:
        """Kinds of numbers that go up and down: keys of `quantised.WIDTHS` or of its levels."""
        up, down = (self.dtype if k == FULL else k for k in (self.uplink, self.downlink))
        return up, down

    @property
    def rule(self) -> str:
        """The key that says so, with its value."""
        if self.untrusted:
            return f"engine.min_clients={'all' if self.min_clients is None else self.min_clients}"
        return f"max_failures={self.max_failures}"

    def whole_blocks(self, cohort: int) -> bool:
        """Return whether every summation block of a cohort lies in one chunk."""
        return self.chunk % SUM_BLOCK == 0 or self.chunk >= cohort


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
        weights=config.aggregation_weights,
        dtype=str(dtype).removeprefix("torch."),
        **vars(config.compression),
        evaluate_every=config.evaluate.every,
        max_failures=config.max_failures,
        **vars(config.engine.waiting(built.cohort)),
    )
