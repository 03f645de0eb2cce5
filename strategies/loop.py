"""Settings of the round loop, and the count of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.method import State
from fedraclora.wire import DTYPES, payload_bytes
from strategies.collect import Exchange

Row = dict[str, object]


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
        timeout: Seconds to wait for the replies of a round.
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
    timeout: float = 3600.0


@dataclass
class Moved:
    """Payload bytes of a round, summed over the cohort."""

    up: int = 0
    down: int = 0
    fetched: int = 0

    def count(self, exchange: Exchange, dtype: str) -> None:
        """Add an exchange: what each asked client was sent, and every row that came."""
        size = DTYPES[dtype].itemsize
        cohort = len(exchange.cohort)
        self.up += exchange.layout.size * size * exchange.received
        self.down += payload_bytes(exchange.downlink, cohort, size) * cohort


def ledger_row(
    exchange: Exchange,
    state: State,
    metrics: dict[str, float],
    moved: Moved,
    totals: tuple[int, int],
) -> Row:
    """Build the ledger row of a round.

    Args:
        exchange: The last exchange of the round.
        state: The state that closed it.
        metrics: Of the new weights; empty where they were not measured.
        moved: Payload bytes of the round.
        totals: Bytes up and down (with catch-up) before it.

    Returns:
        The row, without seconds.
    """
    return {
        "round": exchange.round_,
        "metrics": metrics,
        "train_loss": exchange.mean_loss,
        "cohort": len(exchange.first.cohort),
        "local_steps": exchange.local_steps,
        "failures": [vars(f) for f in exchange.all_failures],
        "uplink_bytes": moved.up,
        "downlink_bytes": moved.down,
        "catchup_bytes": moved.fetched,
        "uplink_total": totals[0] + moved.up,
        "downlink_total": totals[1] + moved.down + moved.fetched,
        "report": state.report,
        "notes": [*state.notes, *exchange.notes],
    }
