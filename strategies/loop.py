"""Settings of the round loop."""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.aggregate import SUM_BLOCK


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the round loop.

    Attributes:
        rounds: Rounds to run in all.
        clients: Size of the population.
        cohort: Clients per round.
        chunk: Clients per train message.
        seed: Of the run.
        weights: ``examples`` or ``uniform``.
        dtype: Of numbers on the wire, that of the base weights.
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        max_failures: Clients that may fail in a round before the run stops.
        timeout: Seconds to wait for the replies of an exchange; None where the engine knows when to
            give up.
    """

    rounds: int
    clients: int
    cohort: int
    chunk: int
    seed: int
    weights: str = "examples"
    dtype: str = "float32"
    evaluate_every: int = 1
    max_failures: int = 0
    timeout: float | None = None

    def whole_blocks(self, cohort: int) -> bool:
        """Whether every summation block of a cohort lies in one chunk."""
        return self.chunk % SUM_BLOCK == 0 or self.chunk >= cohort
