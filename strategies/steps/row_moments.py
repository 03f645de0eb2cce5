"""Second moments of rows at the server: sent with each round, and averaged as they come back.

The formulas are in `fedraclora.training.row_moments`. They travel as tensors that clients train, so
that every engine and every rule for those serves them.
"""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from fedraclora.protocol.method import Downlink, State
from fedraclora.protocol.recipes import RECIPES
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.strategies.steps.conflicts import ROW_MOMENTS, TWICE, refused
from fedraclora.training.row_moments import ROW_SLOT, row_slots


class RowMoments(RoundStep):
    """Keeps them with the moments of the state."""

    @override
    def send(self, sent: Downlink, state: State) -> Downlink:
        if not RECIPES[sent.recipe].steps:  # gradients alone are asked for
            return sent
        return replace(sent, dense=sent.dense | row_slots(sent, state.moments))

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, got: Uplinks) -> State:
        after, sent = close(got), exchange.downlink
        names = [name for name in sent.dense if name.startswith(ROW_SLOT)]
        if not names and RECIPES[sent.recipe].steps:
            raise refused(ROW_MOMENTS, TWICE)
        if not names or not len(got.clients):
            return after
        mean, dtype = got.mean(), next(iter(state.base.values())).dtype
        # An attacker, or a rule that cuts updates apart, may leave less than nothing.
        moments = {n: mean[n].clamp(min=0).to("cpu", dtype) for n in names}
        return replace(after, moments=after.moments | moments)
