"""The ledger row of a round, and the count of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from fedraclora.method import State
from fedraclora.wire import DTYPES, payload_bytes
from strategies.exchange import Exchange

Row = dict[str, object]


@dataclass
class Moved:
    """Payload bytes of a round, summed over the cohort."""

    up: int = 0
    down: int = 0
    fetched: int = 0

    def count(self, exchange: Exchange, dtype: str) -> None:
        """Add an exchange: what each asked client was sent, and every row that came."""
        size = DTYPES[dtype].itemsize
        each = payload_bytes(exchange.downlink, len(exchange.cohort), size)
        self.up += exchange.received * size
        self.down += each * len(exchange.asked)


def ledger_row(
    exchange: Exchange,
    state: State,
    measured: Row,
    moved: Moved,
    totals: tuple[int, int],
) -> Row:
    """Build the ledger row of a round.

    Args:
        exchange: The last exchange of the round.
        state: The state that closed it.
        measured: ``metrics`` of the new weights, empty where they were not measured; and
            ``validation`` where that decides when to stop.
        moved: Payload bytes of the round.
        totals: Bytes up and down (with catch-up) before it.

    Returns:
        The row, without seconds.
    """
    return {
        "round": exchange.round_,
        **measured,
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


def fleet_columns(exchange: Exchange, clock: Row) -> Row:
    """What the ledger says besides where devices differ: who was asked and dropped, and the clock.

    Args:
        exchange: The last exchange of the round.
        clock: The column of virtual seconds; empty where nothing takes time.
    """
    dropped = [vars(refusal) for refusal in exchange.dropped]
    return {"asked": len(exchange.first.asked), "dropped": dropped, **clock}
