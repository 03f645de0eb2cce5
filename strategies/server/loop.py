"""Define the settings of the round loop, built from the config of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedraclora.compatibility import Feature
from fedraclora.config.build import PreparedTask
from fedraclora.config.run_config import RunConfig
from fedraclora.config.settings import ROUNDS_DOWN, ROUNDS_UP, WaitPolicy, rounds
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.quantized import FULL
from fedraclora.protocol.uplinks import SUM_BLOCK


@dataclass(frozen=True)
class LoopConfig(WaitPolicy):
    """Hold the settings of the round loop.

    Attributes:
        rounds: Rounds to run in all.
        clients: Size of the population.
        cohort: Clients per round.
        chunk: Clients per request.
        seed: The seed of the run.
        weights: ``samples`` or ``uniform``.
        dtype: Type of sent numbers, that of the base weights.
        uplink, downlink: Their number format: full, or quantized
            (`fedraclora.protocol.quantized`).
        feedback: Whether clients use error feedback (`fedraclora.wire.feedback`).
        uplink_coding, downlink_coding: Lossless coding of quantized numbers
            (`fedraclora.protocol.coding`).
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        max_failures: Clients that may fail in a round before the run stops.
        lr: The learning rate that clients elsewhere are told; None: their config has it.
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
    lr: float | None = None

    def allowed(self, cohort: int) -> int:
        """Return how many clients of a round may fail."""
        if not self.untrusted:
            return self.max_failures
        return cohort - min(self.min_clients or cohort, cohort)

    @property
    def kinds(self) -> tuple[str, str]:
        """Return the number formats up and down: keys of `quantized.WIDTHS` or of its levels."""
        up, down = (self.dtype if k == FULL else k for k in (self.uplink, self.downlink))
        return up, down

    @property
    def rule(self) -> str:
        """Return the key of the limit with its value, for messages."""
        if self.untrusted:
            return f"engine.min_clients={'all' if self.min_clients is None else self.min_clients}"
        return f"max_failures={self.max_failures}"

    @Feature("aggregation_weights=uniform", instead="aggregation_weights=samples")
    def _weighs_alike(self) -> bool:
        return self.weights == "uniform"

    @Feature("aggregation_weights=samples", instead="aggregation_weights=uniform")
    def _weighs_by_samples(self) -> bool:
        return self.weights == "samples"

    @ROUNDS_UP
    def _rounds_up(self) -> str:
        return rounds("uplink", self.uplink)

    @Feature(
        "compression.uplink=eden1",
        instead="compression.uplink=eden2 (6 % is cut away) or more bits",
    )
    def _cuts_updates(self) -> bool:
        return self.uplink == "eden1"

    @ROUNDS_DOWN
    def _rounds_down(self) -> str:
        return rounds("downlink", self.downlink)

    @Feature(
        "compression.feedback=true",
        instead="compression.feedback=false",
        avoids={
            "a method that trains different tensors in each round": (
                "the error of one tensor does not belong to another"
            ),
            "a method that merges after every round": (
                "the error of a factor has no meaning beside the next frozen factor"
            ),
            "clients that train different parameters": (
                "the error of a factor has no meaning beside another frozen factor"
            ),
            "rank allocation": "the shapes that clients train change",
            "control_variates=true": ("the added error would be read as a gradient"),
            "server_optimizer.space=weights with a method that merges": (
                "after a merge whole weights are sent, and the error of the factors would be lost"
            ),
            "privacy=client_level": (
                "the server clips updates again, and clients do not know what it cut off"
            ),
        },
    )
    def _feeds_back(self) -> bool:
        return self.feedback

    def whole_blocks(self, cohort: int) -> bool:
        """Return whether every summation block of a round is in one chunk."""
        return self.chunk % SUM_BLOCK == 0 or self.chunk >= cohort


def loop_of(config: RunConfig, built: PreparedTask, chunk: int, dtype: torch.dtype) -> LoopConfig:
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
