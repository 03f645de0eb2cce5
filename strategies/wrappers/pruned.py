"""Wrap a method so that its adapters lose components by importance (``allocation=adalora``).

    after round t, for theta in (B, A) of every layer, g = theta_before - theta_after:
        I = |theta_before g|;  I_bar, U_bar smoothed;  an entry scores I_bar U_bar
        a component scores the mean over its column of B plus the mean over its row of A
    the b(t) components of highest score over all layers are kept
    (`fedraclora.allocation.AdaLora`) the others are merged: W <- W + s B_out A_out, and B is
    scaled by s / s' where alpha / r changes

- Bytes: those of the method at the remaining ranks, and r (m + n) numbers to catch up for each
merged
  component. Scores cost no bytes: they are computed from the round's change.
- Aggregation: as the method's: a cut leaves the effective weights.
- Fits methods whose components are continued under one basis (`Method.cuts_components`).
- Source: Zhang et al., *AdaLoRA: adaptive budget allocation for parameter-efficient fine-tuning*,
  ICLR 2023, arXiv 2303.10512: importance, uncertainty and the budget's schedule.
- Departures: B and A stand for its P Lambda and Q: there are no singular values of their own, and
  no penalty that keeps factors orthogonal. g is the change of a round, where the paper has
  gradients of single steps. Cut components are merged and never return, while the paper sets their
  singular value to zero and may raise it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
from typing_extensions import override

from fedraclora.allocation import (
    ALLOCATED,
    CUTS_COMPONENTS,
    AdaLora,
    component_scores,
    kept_components,
)
from fedraclora.errors import ConfigError
from fedraclora.lowrank.algebra import Product, sum_products
from fedraclora.protocol.method import (
    Counters,
    Draw,
    Link,
    Method,
    Plan,
    RoundInstructions,
    State,
    Term,
    Traits,
    apply_link,
)
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.shared.common import opening
from fedraclora.strategies.shared.layerwise import LayerMethod
from fedraclora.strategies.wrappers.around import MethodWrapper
from fedraclora.tree import Tree

SMOOTH = {"importance/": 0, "uncertainty/": 1}


@dataclass(frozen=True)
class PruningState(Counters):
    """Hold the state of the rule.

    Attributes:
        rank: Remaining components, by weight.
        components: All initial components of the layers.
        rounds: Finished rounds.
    """

    rank: dict[str, int] = field(default_factory=dict)
    components: int = 0
    rounds: int = 0


@ALLOCATED
@CUTS_COMPONENTS
@dataclass(frozen=True)
class Pruned(MethodWrapper):
    """Apply the rule to a method.

    Attributes:
        inner: The method.
        rule: The schedule of components.
    """

    counters: ClassVar[type[PruningState]] = PruningState

    inner: LayerMethod
    rule: AdaLora

    @property
    @override
    def traits(self) -> Traits:
        return replace(self.inner.traits, merges=True, varies=True)

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = self.inner.initial_state(base, plan, draw)
        ranks, _ = self.inner.ranks_and_scales(plan)
        last, first = round(self.rule.target * len(ranks)), sum(ranks.values())
        if not 1 <= last <= first:
            raise ConfigError(
                f"allocation.target={self.rule.target}: it leaves {last} of the {first} "
                f"components of {len(ranks)} layers, but 1 to {first} must be left. Change "
                "it, or method.rank"
            )
        return replace(state, counters=PruningState(rank=ranks, components=first))

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        inner, at = self.at(state)
        after = inner.close_round(at, sent, uplinks)
        counters = replace(self.kept(after), rounds=self.kept(after).rounds + 1)
        after = replace(after, plan=state.plan, counters=counters)
        if not sent.program.trains:  # the factors have just begun
            return after
        smoothed = self._smoothed(state, sent, after)
        budget = self.rule.budget(counters.rounds, counters.components, len(state.plan.targets))
        if budget is None or budget >= sum(counters.rank.values()):
            return replace(after, carried=after.carried | smoothed)
        return self._cut(state, sent, after, smoothed, budget)

    @staticmethod
    def kept(state: State) -> PruningState:
        """Compute the remaining ranks in a state."""
        return cast(PruningState, state.counters)

    @override
    def at(self, state: State) -> tuple[Method, State]:
        """Return the method at the remaining ranks, and its own state."""
        left = self.kept(state).rank
        ranks = {n: r for n in state.plan.targets if (r := left[n])}
        plan = replace(state.plan, targets={n: state.plan.targets[n] for n in ranks})
        carried = {n: t for n, t in state.carried.items() if not n.startswith(tuple(SMOOTH))}
        inner = replace(self.inner, rank=ranks) if ranks else self.inner
        return inner, replace(state, plan=plan, carried=carried)

    @override
    def in_effect(self, state: State) -> tuple[Method, State]:
        return self.at(state)

    def _smoothed(self, state: State, sent: RoundInstructions, after: State) -> Tree:
        """Smooth the importance of each entry, and its uncertainty."""
        found: Tree = {}
        for name, slot in sent.trained().items():
            if name not in after.carried:
                continue
            now = after.carried[name].double()
            start = opening(slot, now)
            old = [state.carried.get(prefix + name) for prefix in SMOOTH]
            pair = None if old[0] is None or old[1] is None else (old[0], old[1])
            values = self.rule.smoothed(pair, start, start - now)
            found |= {prefix + name: values[i] for prefix, i in SMOOTH.items()}
        return found

    def _cut(
        self, state: State, sent: RoundInstructions, after: State, smoothed: Tree, budget: int
    ) -> State:
        """Keep the best components, and merge the others."""
        scores = {}
        for name in sent.adapters:
            factors = [f"{name}/B", f"{name}/A"]
            B, A = (smoothed[f"importance/{n}"] * smoothed[f"uncertainty/{n}"] for n in factors)
            scores[name] = component_scores(B, A)
        carried: Tree = {}
        before = after.link or Link()
        left, terms = dict(self.kept(after).rank), dict(before.terms)
        for name, kept in kept_components(scores, budget).items():
            scale = sent.adapters[name].scale
            B, A = (after.carried[f"{name}/{k}"] for k in ("B", "A"))
            out = torch.ones(len(A), dtype=torch.bool)
            out[kept] = False
            left[name] = len(kept)
            if out.any():
                terms[name] = joined(terms.get(name), (B[:, out], A[out]), scale)
            if not len(kept):
                continue
            now = self.inner.scale_of(len(kept))
            carried |= {f"{name}/B": B[:, kept] * (scale / now), f"{name}/A": A[kept]}
            for prefix in SMOOTH:
                carried[f"{prefix}{name}/B"] = smoothed[f"{prefix}{name}/B"][:, kept]
                carried[f"{prefix}{name}/A"] = smoothed[f"{prefix}{name}/A"][kept]
        link = Link(terms, before.dense)
        another = after.counters.sketch + 1  # the trained tensors change now
        counters = replace(self.kept(after), rank=left, sketch=another)
        base = apply_link(state.base, link, state.plan)
        return replace(after, base=base, carried=carried, counters=counters, link=link)


def joined(term: Term | None, more: Product, scale: float) -> Term:
    """Add a product to a weight's merged term, at the same scale."""
    if term is None:
        return Term.of(more, scale)
    first, second = (factor.draw() for factor in term.factors)
    return Term.of(sum_products((first, second), more), scale)
