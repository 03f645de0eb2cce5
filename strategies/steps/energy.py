"""The energy that a basis sees, told only where a step follows the gradient."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.strategies.shared.past import ENERGY
from fedraclora.training.localconfig import LocalConfig


def follows_gradient(local: LocalConfig) -> bool:
    """Check whether a component moves by a multiple of its gradient, the same for all of a client.

    Adam's steps have one size whatever a row sees, and a preconditioner divides by the lengths of
    rows, so that `strategies.shared.past.energies` would read its own step size back; a layer that
    is clipped by itself would count for too little beside the others.
    """
    return local.optimiser == "sgd" and not local.added and local.clip_by == "all"


class NoEnergy(RoundStep):
    """Leaves ``energy_seen`` out of the ledger."""

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, got: Uplinks) -> State:
        after = close(got)
        return replace(after, report={n: x for n, x in after.report.items() if n != ENERGY})
