"""Handle tensors trained in full beside the adapters, and merges after some rounds."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from fedraclora.lowrank.algebra import Product, negated, product_norm, sum_products
from fedraclora.protocol.factor import Factor, to_train
from fedraclora.protocol.method import (
    Link,
    Plan,
    State,
    apply_link,
)
from fedraclora.tree import Tree


def dense_slots(state: State) -> dict[str, Factor]:
    """Build the slots of fully trained tensors (head, biases), averaged or kept by clients."""
    plan, shapes = state.plan, state.plan.shapes
    names = (*plan.dense, *plan.local)
    return {n: to_train(shapes[n], main=False, upload=n not in plan.local) for n in names}


def dense_means(state: State, mean: Tree, step: float = 1.0) -> Tree:
    """Average the tensors of `dense_slots`, in the precision of the base.

    Args:
        state: The state before the round.
        mean: The averaged updates.
        step: The server's step size; 1: the average.
    """
    return {
        name: server_step(state.base[name], mean[name], step).to(state.base[name].dtype)
        for name in state.plan.dense
    }


def server_step(old: torch.Tensor | None, mean: torch.Tensor, step: float) -> torch.Tensor:
    """Compute ``old + step (mean - old)``; exactly the mean if step is 1; None stands for 0."""
    if step == 1.0:
        return mean
    if old is None:
        return step * mean
    old = old.to(mean.device)  # means are on the host, and the base may be on a GPU
    return old + step * (mean - old)


def closed(
    state: State,
    link: Link,
    *,
    carried: Tree | None = None,
    ends: bool = True,
    report: dict[str, float] | None = None,
) -> State:
    """Build the state after a round.

    Args:
        state: The state before it.
        link: The round's change of the base.
        carried: Factors that are continued.
        ends: Whether the merge period ends, so that the next trained factors are new and moments
            are reset.
        report: Figures for the ledger.
    """
    sketch, age = state.counters.sketch, state.counters.age + 1
    return replace(
        state,
        base=apply_link(state.base, link, state.plan),
        carried=carried or {},
        counters=replace(state.counters, sketch=sketch + ends, age=0 if ends else age),
        link=link,
        report=report or {},
        notes=(),
    )


def turned(plan: Plan) -> tuple[str, ...]:
    """Return the names of weights stored as (in, out), for programs that use matrices."""
    return tuple(name for name, view in plan.targets.items() if view.kind == "conv1d")


def as_matrices(stored: torch.Tensor, *, turned: bool) -> torch.Tensor:
    """View weights [K, ...] as [K, out, in]; ``turned`` if they are stored (in, out)."""
    return stored.mT if turned else stored.reshape(*stored.shape[:2], -1)


def column_parts(gradient: torch.Tensor, parts: int) -> torch.Tensor:
    """Number the columns of a gradient [K, m, r] by their part, of equal parts: [r]."""
    columns = gradient.shape[-1]
    return torch.arange(columns, device=gradient.device) * parts // columns


def opening(slot: Factor, like: torch.Tensor) -> torch.Tensor:
    """Return the start of a factor, in the precision and on the device of ``like``.

    If clients start at different values, their mean.
    """
    start = slot.opening()
    if start is None:
        return torch.zeros(slot.shape).to(like)
    return (start.double().mean(dim=0) if slot.per_client else start).to(like)


def dense_floats(plan: Plan) -> int:
    """Count the numbers in the tensors of `dense_slots`."""
    return sum(prod(plan.shapes[name]) for name in plan.dense)


class RoundError:
    """Compute a round's distance from the clients' mean, relative to the mean change."""

    def __init__(self) -> None:
        self.missed = self.change = 0.0

    def add(self, mean: Product, old: Product | None, new: Product, scale: float) -> None:
        """Add one weight: the mean of the clients' terms, the old term, and the new one."""
        self.missed += (scale * product_norm(*sum_products(new, negated(mean)))) ** 2
        moved = mean if old is None else sum_products(mean, negated(old))
        self.change += (scale * product_norm(*moved)) ** 2

    def report(self) -> dict[str, float]:
        """Compute the figure for the ledger, ``aggregation_error``."""
        return {"aggregation_error": (self.missed / self.change) ** 0.5 if self.change else 0.0}
