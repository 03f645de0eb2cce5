"""SCAFFOLD at the server: the mean variate, what of it goes down, and which methods it is for.

The formulas are in `fedraclora.training.extras.variates`. The server keeps its part in the state of
the run, the clients theirs between rounds, where the moments of their optimisers are.

- Uplink: that of the method. Downlink: r m numbers per matrix and client more, as is trained.
- Client state: as much as is trained; m n numbers per matrix where sketches are drawn anew.
"""

from __future__ import annotations

import torch

from fedraclora.aggregation.base import Aggregator
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel, Privacy
from fedraclora.protocol.change_of_basis import held_beside
from fedraclora.protocol.downlink import opening_rows
from fedraclora.protocol.method import Cohort, Downlink, Draw, Method, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.training.extras.variates import blank_variates, moved_by, seen, with_variates
from fedraclora.training.gradients import mean_gradients
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Layout, Tree

OFF = "or set control_variates=false"


def check_scaffold(method: Method, state: State, local: LocalConfig, draw: Draw) -> bool:
    """Refuse what control variates are not defined for.

    Args:
        method: The method.
        state: Before its first round.
        local: Local settings.
        draw: The method's randomness.

    Returns:
        Whether clients keep dense estimates of gradients, since what is trained changes.

    Raises:
        ConfigError: Saying why, and what to take.
    """
    _check_local(local)
    traits = method.traits
    if method.client_state or not traits.linear:
        why = "a part stays at each client" if method.client_state else "its server refits factors"
        raise ConfigError(
            f"control_variates is true, but with this method {why}, so that gradients of two "
            f"rounds have no coordinates in common; take a method with one shared mean, {OFF}"
        )
    sent = method.open_round(state, 1, Cohort(torch.arange(2), torch.ones(2)), draw)
    _check_sent(sent)
    if not sent.adapters or (not traits.merges and _lives_on(method, state, sent, draw)):
        return False
    for weight, adapter in sent.adapters.items():
        if held_beside(adapter) is None:
            raise ConfigError(
                f"control_variates is true, but what is trained of {weight} begins anew, and its "
                "gradients tell nothing of the next; take a method that trains one factor beside "
                f"a shared one, {OFF}"
            )
    return True


def check_seen(aggregator: Aggregator, privacy: Privacy) -> None:
    """Refuse what lets the server know other updates than those that clients keep variates of.

    The server's variate is the mean of the clients' because both are formed from the same numbers.
    Clips at the clients (``secure=secagg``) come before either.

    Raises:
        ConfigError: Saying why, and what to take.
    """
    if isinstance(privacy, ClientLevel):
        raise ConfigError(
            "control_variates is true, but privacy=client_level adds noise to the mean from which "
            "the server's variate is formed. No client knows that noise, so it would add up in the "
            f"correction from round to round; take privacy=none, {OFF}"
        )
    if aggregator.individuals:
        raise ConfigError(
            f"control_variates is true, but aggregator={aggregator.name} changes or leaves out "
            "updates when they have arrived. Clients keep variates of what they sent, so the "
            "correction would point to what the server has cut away; take aggregator=mean (a clip "
            f"at the clients is that of secure=secagg), {OFF}"
        )


def _check_local(local: LocalConfig) -> None:
    """Refuse local steps from whose sum the mean gradient cannot be told."""
    if not local.steps:
        raise ConfigError(
            f"local.steps is {local.steps}, but with control_variates all clients take one number "
            "of steps, by which the server knows their mean gradient; set local.steps, 1 or more"
        )
    beside = {
        "optimiser": local.optimiser != "sgd",
        "momentum": local.momentum,
        "weight_decay": local.weight_decay,
        "clip": local.clip is not None,
    }
    found = [f"local.{key}={getattr(local, key)}" for key, used in beside.items() if used]
    if found := found + [extra.setting for extra in local.extras]:
        raise ConfigError(
            f"control_variates needs plain SGD, but there is {found[0]}; leave it out "
            f"(local=sgd), {OFF}"
        )


def _check_sent(sent: Downlink) -> None:
    if sent.recipe != "plain" or sent.apart:
        what = "other factors for each client" if sent.apart else f"the recipe {sent.recipe}"
        raise ConfigError(
            f"control_variates is true, but this round has {what}, for which a mean gradient is "
            f"not defined; take another method or system.rank_budget=null, {OFF}"
        )


def _lives_on(method: Method, state: State, sent: Downlink, draw: Draw) -> bool:
    """Tell whether the next round trains the same thing: a round without a change is closed."""
    layout, cohort = _layout(sent), Cohort(torch.arange(2), torch.ones(2).double())
    start = opening_rows(sent, state.base, layout, cohort.clients)
    got = Uplinks(cohort.clients, cohort.weights, layout, start.repeat(2, 1))
    after = method.close_round(state, sent, got)
    return method.open_round(after, 2, cohort, draw).link == sent.link


def open_corrected(sent: Downlink, state: State, *, lifted: bool) -> Downlink:
    """Send the server's variates with a round.

    Args:
        sent: What the method asks.
        state: Has them, zero before the first round.
        lifted: Whether they are kept as dense estimates.

    Raises:
        ConfigError: If this round has no mean gradient.
    """
    _check_sent(sent)
    sent = with_variates(sent, {}, lifted=lifted)
    return with_variates(sent, seen(_kept(state, sent), sent), lifted=lifted)


def close_corrected(
    state: State, sent: Downlink, got: Uplinks, rates: dict[str, float], steps: int, share: float
) -> Tree:
    """Give the moments of the next state: with the variates that a round leaves at the server.

    Args:
        state: Before the round.
        sent: What was asked, by `open_corrected`.
        got: What came; its mean is enough.
        rates: Step sizes of what was trained.
        steps: Local steps of each client.
        share: Of the population that the cohort is, |S| / N.
    """
    layout = got.layout
    start = layout.unpack(opening_rows(sent, state.base, layout, torch.arange(len(got.clients))))
    end = {n: t.cpu() for n, t in got.mean().items()}
    new = mean_gradients(start, end, steps, rates)
    return state.moments | moved_by(_kept(state, sent), sent, new, share)


def _kept(state: State, sent: Downlink) -> Tree:
    blank = blank_variates(sent, next(iter(state.base.values())).dtype)
    return {n: state.moments.get(n, zero) for n, zero in blank.items()}


def _layout(sent: Downlink) -> Layout:
    return Layout(tuple((n, s.shape) for n, s in sent.uploaded().items()))
