"""Apply a server optimizer between the mean of a round and the next state, for any method.

In the space of **weights** Delta is the method's change of the effective weights, of any form, and
the optimizer's correction goes into the base weights:

    W_new = W_old + step(Delta);   Delta = W(after) - W(before), dense

The moments are dense, and stay at the server. The step has full rank, so an absent client must
catch up on the dense weight: m n numbers per matrix and round, instead of r m for a low-rank merge;
and on the factor from which the next one is computed (`fedraclora.protocol.factor`). Uplink and
trained tensors do not change.

In the space of **factors** Delta is the mean of the clients' updates less their start, and the
method receives start + step(Delta) as the mean: bytes and merges are those of the method. Moments
of a factor belong to the frozen factor beside it. If that changes from round to round, momentum is
transformed (`fedraclora.protocol.change_of_basis`), which keeps a share r/n of its energy for a
fresh sketch; the ledger has the kept share (``momentum_kept``). Second moments cannot be
transformed.

A method's exactness then refers to Delta, from which the server continues.

References:
    Reddi et al., arXiv 2003.00295. The two spaces for low-rank methods are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from typing_extensions import override

from fedraclora.aggregation.server_optimizers import ServerOptimizer
from fedraclora.compatibility import Feature, conflict
from fedraclora.data.own_loss import PASSING
from fedraclora.errors import ConfigError
from fedraclora.imports import as_user_error
from fedraclora.lowrank.algebra import product_norm
from fedraclora.protocol.change_of_basis import as_product, held_beside, transported
from fedraclora.protocol.factor import weight_of
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import (
    FROZEN_CHANGED,
    Draw,
    Link,
    Method,
    RoundInstructions,
    State,
    apply_link,
)
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.schema import of_project
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.strategies.server.sound import describe, tree
from fedraclora.strategies.wrappers.around import inside
from fedraclora.tree import Tree


class OptimisedServer(RoundStep):
    """Close a round with the server's step in place of the mean.

    Args:
        rule: The optimizer.
    """

    def __init__(self, rule: ServerOptimizer) -> None:
        self.rule = rule

    @Feature(
        "server_optimizer.space=weights with a method that merges",
        instead="server_optimizer=none or space=factors",
    )
    def _sends_whole_weights(self) -> bool:
        outer, *_, inner = [self.run.method, *inside(self.run.method)]
        ends = outer.traits.merges and inner.link_rounds is not None
        return self.rule.space == "weights" and ends

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        rule = self.rule
        if rule.space == "weights":
            return step_in_weights(rule, self.run.method, state, close(uplinks), self.run.draw)
        stepped, moments, report = step_in_factors(rule, state, exchange.downlink, uplinks)
        after = close(stepped)
        return replace(after, moments=state.moments | moments, report=after.report | report)


def step_in_weights(
    rule: ServerOptimizer, method: Method, before: State, after: State, draw: Draw
) -> State:
    """Replace the method's mean step in weight space by the server's step.

    Args:
        rule: The optimizer.
        method: Computes effective weights.
        before: The state before the round.
        after: The method's state after it.
        draw: The method's sketches.

    Returns:
        ``after`` with another base and merge: its effective weights are those of ``before`` plus
        the step. The merge has a dense value for each weight into which the method has merged, or
        whose step is not the mean change; and for the factor from which the next one is computed.
    """
    plan = before.plan
    old, new = (
        {n: t.double() for n, t in method.weights(state, draw).items()} for state in (before, after)
    )
    names = list(dict.fromkeys([*plan.targets, *plan.dense, *plan.weights]))
    change = {n: new[n] - old[n] for n in names}
    steps, moments = optimizer_step(rule, change, _own(before))
    given = {} if after.link is None else after.link.dense
    dense = {n: t for n, t in given.items() if n not in change}
    for name in names:
        # The method's tensors beside the base stay unchanged. If the step is the mean change, the
        # correction is skipped: its last bit would make a full weight necessary.
        base, own = after.base[name], not torch.equal(steps[name], change[name])
        if own:
            base = (base.double() + (old[name] + steps[name] - new[name])).to(base.dtype)
        if own or base is not before.base[name]:
            dense[name] = base
    # No term of this merge contains the factor from which the next one is computed.
    beside = {name: t for name, t in after.base.items() if weight_of(name) is not None}
    dense |= {name: t for name, t in beside.items() if t is not before.base.get(name)}
    link = Link(dense=dense)
    like = before.base  # from the moment ``first/<name>``, the name
    moments = {n: m.to(like[n.partition("/")[2]]) for n, m in moments.items()}
    return replace(
        after,
        base=apply_link(before.base, link, plan),
        link=link,
        moments=before.moments | moments,
        report=after.report | _went(steps, change),
    )


def step_in_factors(
    rule: ServerOptimizer, state: State, sent: RoundInstructions, uplinks: Uplinks
) -> tuple[Uplinks, Tree, dict[str, float]]:
    """Replace the mean of the updates by start + step(mean - start).

    Args:
        rule: The optimizer.
        state: The state before the round.
        sent: The instructions.
        uplinks: The updates; their mean is enough.

    Returns:
        Uplinks with this mean, the new moments, and the report.

    Raises:
        ConfigError: If coordinates changed that have moments of their own.
    """
    places = torch.arange(len(uplinks.clients)) if uplinks.places is None else uplinks.places
    start = opening_rows(sent, state.base, uplinks.layout, places)
    change = uplinks.layout.unpack((uplinks.sum() / uplinks.total).cpu() - start)
    before, report = _beside(rule, _own(state), sent)
    steps, moments = optimizer_step(rule, change, before)
    stepped = start + uplinks.layout.pack(steps)
    like = next(iter(state.base.values())).dtype
    moments = {n: m.to(like) for n, m in moments.items()}
    report |= _went(steps, change)
    return replace(uplinks, stacked=None, summed=stepped, denominator=1.0), moments, report


def optimizer_step(rule: ServerOptimizer, change: Tree, moments: Tree) -> tuple[Tree, Tree]:
    """Run a server optimizer's step; check the result of a user's.

    Raises:
        ConfigError: Naming the optimizer, and its result.
    """
    if of_project(type(rule)):
        return rule.advance(change, moments)
    who = f"the server optimizer {type(rule).__name__}"
    with as_user_error(ConfigError, f"{who}: ", "calling its advance", passing=PASSING):
        found: object = rule.advance(dict(change), dict(moments))
    if not isinstance(found, tuple) or len(found) != 2:
        raise ConfigError(f"{who} returns {describe(found)}, expected a pair (steps, moments)")
    tree(f"{who}, its steps", found[0], change)
    like = {f"{kind}/{name}": t for name, t in change.items() for kind in ("first", "second")}
    if not isinstance(found[1], Mapping):
        raise ConfigError(f"{who} returns the moments {describe(found[1])}, expected a dict")
    named = {name: like.get(name, moments.get(name)) for name in found[1]}
    if odd := [name for name, known in named.items() if known is None]:
        raise ConfigError(
            f"{who} returns the moment {odd[0]!r}, expected first/NAME or second/NAME of a tensor"
        )
    tree(f"{who}, its moments", found[1], {n: t for n, t in named.items() if t is not None})
    return found


def _beside(
    rule: ServerOptimizer, moments: Tree, sent: RoundInstructions
) -> tuple[Tree, dict[str, float]]:
    """Transform the moments of factors with the frozen ones beside them; report the kept share."""
    out, before, after = dict(moments), 0.0, 0.0
    for weight, adapter in sent.adapters.items():
        if (pair := held_beside(adapter)) is None:
            continue
        label, new = pair
        first, partner = f"first/{weight}/{label}", f"beside/{weight}/{label}"
        out[partner] = new
        if first not in moments:
            continue
        old, moment = moments[partner].double(), moments[first].double()
        same = torch.equal(moments[partner], new.to(moments[partner]))
        if rule.adapts and not same:
            raise conflict(ServerOptimizer, FROZEN_CHANGED, weight)
        out[first] = moment if same else transported(label, moment, old, new)
        before += product_norm(*as_product(label, moment, old)) ** 2
        after += product_norm(*as_product(label, out[first], new)) ** 2
    return out, {"momentum_kept": after / before} if before else {}


def _own(state: State) -> Tree:
    """Select the optimizer's moments: the others belong to other parts."""
    kinds = ("first/", "second/", "beside/")
    return {n: m for n, m in state.moments.items() if n.startswith(kinds)}


def _went(steps: Tree, change: Tree) -> dict[str, float]:
    """Compare the length of the server's step with that of the clients' mean change."""
    far, mean = (
        sum(float(t.square().sum()) for t in tree.values()) ** 0.5 for tree in (steps, change)
    )
    return {"server_step": far / mean if mean else 0.0}
