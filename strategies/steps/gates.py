"""Gates of adapters (`local.gate_penalty`): how many components a round has closed."""

from __future__ import annotations

from typing_extensions import override

from fedraclora.protocol.uplinks import Uplinks
from fedraclora.training.gates import pruned
from strategies.server.exchange import Exchange
from strategies.server.round_step import RoundStep
from strategies.server.rows import Row


class Gates(RoundStep):
    """Tells the ledger which share of the components no client kept."""

    @override
    def columns(self, exchange: Exchange, got: Uplinks | None) -> Row:
        return {} if got is None else {**pruned(exchange.downlink, got)}
