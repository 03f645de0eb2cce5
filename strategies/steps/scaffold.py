"""Run SCAFFOLD at the server: the mean variate, its downlink, and the supported methods.

The formulas are in `fedraclora.training.extras.variates`. The server keeps its part in the state of
the run, the clients theirs between rounds, where the moments of their optimizers are.

- Uplink: that of the method. Downlink: r m more numbers per matrix and client, as many as are
trained. - Client state: as many numbers as are trained; m n per matrix if sketches change.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature, conflict
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import (
    BEGINS_ANEW,
    Cohort,
    Draw,
    Method,
    RoundInstructions,
    State,
    first_instructions,
)
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.training.extras.variates import (
    blank_variates,
    moved_by,
    seen,
    variates_of,
    with_variates,
)
from fedraclora.training.optimizer import mean_gradients
from fedraclora.tree import Tree


@Feature(
    "control_variates=true",
    instead="control_variates=false",
    avoids={
        "privacy=client_level": ("the noise would add up in the server's control variate"),
        "a robust rule that needs each client's update": (
            "the server computes its control variate from the clients' unchanged updates"
        ),
        "local steps other than plain SGD": "the mean gradient cannot be computed from their sum",
        "a method that keeps a part of the model at each client": (
            "gradients of two rounds have different coordinates"
        ),
        "a method that needs each client's update": (
            "its server changes the factors, so gradients of two rounds have different coordinates"
        ),
        "a round without a mean gradient": "control variates are mean gradients",
        "a method that has restarted its trained factors": (
            "old gradients say nothing about the new factors, unless the frozen factor is shared"
        ),
        "rank allocation": "it changes which parameters have control variates",
    },
    requires={
        "local.steps": (
            "the server divides by the number of local steps, which must be equal for all clients"
        ),
    },
)
class ControlVariates(RoundStep):
    """Send the server's variate, and update it from the replies.

    Attributes:
        lifted: Whether variates are dense estimates of gradients, since trained tensors change; set
            by `begin`.
    """

    lifted: bool

    @override
    def begin(self, state: State) -> None:
        self.lifted = keeps_dense_variates(self.run.method, state, self.run.draw)

    @override
    def send(self, sent: RoundInstructions, state: State) -> RoundInstructions:
        return open_corrected(sent, state, lifted=self.lifted)

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        after = close(uplinks)
        if not len(uplinks.clients):
            return after
        sent, local = exchange.downlink, self.run.local
        share = len(uplinks.clients) / exchange.loop.clients
        rates = {n: local.rate(s.main, exchange.rate_scale) for n, s in sent.uploaded().items()}
        moments = close_corrected(state, sent, uplinks, rates, local.steps or 1, share)
        return replace(after, moments=after.moments | moments)


def keeps_dense_variates(method: Method, state: State, draw: Draw) -> bool:
    """Check whether clients keep dense estimates of gradients, since trained tensors change.

    Args:
        method: The method.
        state: The state before its first round.
        draw: The method's sketches.

    Raises:
        ConfigError: If variates are impossible, since both factors are reset.
    """
    sent = first_instructions(method, state, draw, 2)
    if not sent.adapters or (not method.traits.merges and _lives_on(method, state, sent, draw)):
        return False
    for weight, adapter in sent.adapters.items():
        if not adapter.trains_beside_shared:
            raise conflict(ControlVariates, BEGINS_ANEW, weight)
    return True


def _lives_on(method: Method, state: State, sent: RoundInstructions, draw: Draw) -> bool:
    """Check whether the next round trains the same tensors, by closing a round without a change."""
    layout, cohort = sent.layout, Cohort(torch.arange(2), torch.ones(2).double())
    start = opening_rows(sent, state.base, layout, cohort.clients)
    uplinks = Uplinks(cohort.clients, cohort.weights, layout, start.repeat(2, 1))
    after = method.close_round(state, sent, uplinks)
    return method.open_round(after, 2, cohort, draw).link == sent.link


def open_corrected(sent: RoundInstructions, state: State, *, lifted: bool) -> RoundInstructions:
    """Send the server's variates with a round.

    Args:
        sent: The method's instructions.
        state: The state with the variates, zero before the first round.
        lifted: Whether they are kept as dense estimates.
    """
    sent = with_variates(sent, {}, lifted=lifted)
    return with_variates(sent, seen(_kept(state, sent), sent), lifted=lifted)


def close_corrected(
    state: State,
    sent: RoundInstructions,
    uplinks: Uplinks,
    rates: dict[str, float],
    steps: int,
    share: float,
) -> Tree:
    """Compute the moments of the next state, with the server's new variates.

    Args:
        state: The state before the round.
        sent: The instructions, from `open_corrected`.
        uplinks: The updates; their mean is enough.
        rates: Step sizes of trained tensors.
        steps: Local steps of each client.
        share: Share of the population in the round, |S| / N.
    """
    layout = uplinks.layout
    start = layout.unpack(
        opening_rows(sent, state.base, layout, torch.arange(len(uplinks.clients)))
    )
    end = {n: t.cpu() for n, t in uplinks.mean().items()}
    new, kept = mean_gradients(start, end, steps, rates), _kept(state, sent)
    # Clients used the received c in their steps, which may have been quantized.
    went = variates_of(sent)
    new = {n: new[n] + (c.double() - went[n].double()) for n, c in seen(kept, sent).items()}
    return state.moments | moved_by(kept, sent, new, share)


def _kept(state: State, sent: RoundInstructions) -> Tree:
    blank = blank_variates(sent, next(iter(state.base.values())).dtype)
    return {n: state.moments.get(n, zero) for n, zero in blank.items()}
