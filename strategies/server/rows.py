"""The ledger row of a round, and the count of its bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedraclora.engines.deploy import Traffic
from fedraclora.protocol.method import State
from fedraclora.weights.chain import CatchUp
from fedraclora.wire.downlink import payload_bytes
from strategies.server.exchange import Exchange

Row = dict[str, object]


@dataclass
class Moved:
    """Payload bytes of a round, summed over the cohort.

    Attributes:
        up, down: What clients sent, and what they were sent.
        fetched: What they caught up on.
        transport: Where messages leave the machine: what these are longer by.
    """

    up: int = 0
    down: int = 0
    fetched: int = 0
    transport: int | None = None

    def count(self, exchange: Exchange) -> None:
        """Add an exchange: what each asked client was sent, and every row that came."""
        _, kind = exchange.loop.kinds
        each = payload_bytes(exchange.downlink, len(exchange.cohort), kind)
        self.up += exchange.received
        self.down += each * len(exchange.asked)

    def fetch(self, catch_up: CatchUp, exchange: Exchange, sent: Traffic | None) -> None:
        """Update the clients of a round to the newest version, and count what they fetched.

        Args:
            catch_up: The versions that clients hold.
            exchange: The last of the round, which did not fail.
            sent: What went over the wire; None in a simulation, where `catch_up` says it.
        """
        asked = exchange.first.asked.clients
        if sent is None:
            self.fetched = int(catch_up.fetch(asked).sum())
            return
        failed = torch.tensor([f.client for f in exchange.all_failures], dtype=torch.int64)
        catch_up.fetch(asked[~torch.isin(asked, failed)])
        self.fetched = sent.fetched
        self.transport = sent.serialised - self.up - self.down - self.fetched


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
        **({} if moved.transport is None else {"transport_bytes": moved.transport}),
        "uplink_total": totals[0] + moved.up,
        "downlink_total": totals[1] + moved.down + moved.fetched,
        **({} if exchange.rounding is None else {"rounding_up": exchange.rounding}),
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
