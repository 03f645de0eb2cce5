"""Build the ledger row of a round, and count its bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import torch

from fedraclora.engines.base import Traffic, add_up
from fedraclora.protocol.method import State
from fedraclora.run.ledger import Row
from fedraclora.run.recorder import Stopwatch
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.weights.chain import CatchUp


@dataclass
class Cost:
    """Count the cost of a round over all its attempts: payload bytes and seconds.

    Attributes:
        up, down: Bytes that clients sent and received.
        fetched: Bytes of their catch-up.
        transport: Further bytes of messages that leave the machine.
        nodes: All bytes of messages, by node and way.
        watch: Measures the seconds.
    """

    up: int = 0
    down: int = 0
    fetched: int = 0
    transport: int | None = None
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)
    watch: Stopwatch = field(default_factory=Stopwatch)

    def count(self, exchange: Exchange, traffic: Traffic | None) -> None:
        """Add an exchange, also a failed one: all sent instructions, and every received row.

        Args:
            exchange: The exchange that has just ended.
            traffic: Communication since; None in a simulation, where each asked client receives its
                message once.
        """
        size = cache(exchange.payload_bytes)
        self.up += exchange.received
        if traffic is None:
            self.down += size() * len(exchange.asked)
            return
        own = {id(ask.downlink) for ask in exchange.asks}
        sent = (len(ask.request.clients) for ask in traffic.sent if id(ask.downlink) in own)
        self.down += sum(size(clients) * times for clients, times in Counter(sent).items())
        traffic.sent.clear()

    def fetch(self, catch_up: CatchUp, exchange: Exchange, sent: Traffic | None) -> None:
        """Update the clients of a round to the newest version, and count what they fetched.

        Args:
            catch_up: The versions that clients hold.
            exchange: The round's last exchange, which did not fail.
            sent: Communication; None in a simulation, where `catch_up` computes it.
        """
        asked = exchange.first.asked.clients
        if sent is None:
            self.fetched = int(catch_up.fetch(asked).sum())
            return
        failed = torch.tensor([f.client for f in exchange.all_failures], dtype=torch.int64)
        catch_up.fetch(asked[~torch.isin(asked, failed)])
        self.fetched = sent.fetched
        self.transport = sent.serialized - self.up - self.down - self.fetched
        add_up(self.nodes, sent.nodes)

    def add(self, part: Cost) -> Row:
        """Add the cost of a measurement; return its bytes up, and down with catch-up."""
        self.up, self.down = self.up + part.up, self.down + part.down
        self.fetched += part.fetched
        if part.transport is not None:
            self.transport = (self.transport or 0) + part.transport
        add_up(self.nodes, part.nodes)
        return {"uplink_bytes": part.up, "downlink_bytes": part.down + part.fetched}


def ledger_row(
    exchange: Exchange,
    state: State,
    measured: Row,
    cost: Cost,
    totals: tuple[int, int],
) -> Row:
    """Build the ledger row of a round.

    Args:
        exchange: The last exchange of the round.
        state: The state after the round.
        measured: ``metrics`` of the new weights, empty if they were not measured; and
            ``validation`` if early stopping needs it.
        cost: The cost of the round.
        totals: Bytes up and down (with catch-up) before it.

    Returns:
        The row, without seconds.
    """
    return {
        "round": exchange.round_,
        **measured,
        "train_loss": exchange.mean_loss,
        **({"train_metrics": exchange.metrics} if exchange.metrics else {}),
        "cohort": len(exchange.first.cohort),
        "local_steps": exchange.local_steps,
        "failures": [vars(f) for f in exchange.all_failures],
        "uplink_bytes": cost.up,
        "downlink_bytes": cost.down,
        "catchup_bytes": cost.fetched,
        **({} if cost.transport is None else {"transport_bytes": cost.transport}),
        **({"transport": cost.nodes} if cost.nodes else {}),
        "uplink_total": totals[0] + cost.up,
        "downlink_total": totals[1] + cost.down + cost.fetched,
        **({} if exchange.rounding is None else {"rounding_up": exchange.rounding}),
        "report": state.report,
        "notes": [*state.notes, *exchange.notes],
    }
