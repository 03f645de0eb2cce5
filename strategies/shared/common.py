"""What several methods share: tensors trained in full beside the adapters, and links by age."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Annotated

import torch

from fedraclora.errors import ConfigError
from fedraclora.limits import choice_of
from fedraclora.protocol.method import (
    Link,
    Plan,
    State,
    Trained,
    apply_link,
)
from fedraclora.protocol.plan import Rank, Ranks, resolve_rank
from fedraclora.tree import Tree

# What shares the dimension of a drawing, for messages.
PARTS = "sketches (method.sketches, times method.pool where there is one)"
# What is drawn: A (right), B (left), or the larger factor.
Side = Annotated[str, choice_of(("right", "left", "auto"))]


def draws_right(side: str, shape: tuple[int, int]) -> bool:
    """Check whether A is the factor of a layer that is drawn; ``auto``: the larger one is."""
    m, n = shape
    return side == "right" or (side == "auto" and n >= m)


def drawn_rank(rank: Ranks, side: str, plan: Plan, name: str, *, cap: bool, parts: int = 1) -> Rank:
    """Compute the rank of a layer; its bound is the dimension of the side that is drawn.

    With several ``parts`` of one drawing it is the rank of each, and they share the dimension.

    Raises:
        ConfigError: If there are more parts than dimensions.
    """
    shape = plan.targets[name].shape
    dim = shape[1 if draws_right(side, shape) else 0]
    if parts > dim:
        raise ConfigError(
            f"a drawing is cut into {parts} {PARTS}, but {name} has only {dim} dimensions on "
            "the drawn side; take fewer"
        )
    return resolve_rank(rank, dim, name, cap=cap, parts=parts, of=PARTS)


def dense_slots(state: State) -> dict[str, Trained]:
    """Head, biases and other tensors that the plan trains in full, averaged or kept by clients."""
    plan, shapes = state.plan, state.plan.shapes
    averaged = {name: Trained(shapes[name], main=False) for name in plan.dense}
    return averaged | {name: Trained(shapes[name], main=False, upload=False) for name in plan.local}


def dense_means(state: State, mean: Tree, step: float = 1.0) -> Tree:
    """Averages of the tensors of `dense_slots`, in the precision of the base.

    Args:
        state: Before the round.
        mean: What the cohort sent, averaged.
        step: The server's; 1 takes the average itself.
    """
    return {
        name: server_step(state.base[name], mean[name], step).to(state.base[name].dtype)
        for name in state.plan.dense
    }


def server_step(old: torch.Tensor | None, mean: torch.Tensor, step: float) -> torch.Tensor:
    """Compute ``old + step (mean - old)``; the mean to the bit if step is 1; None stands for 0."""
    if step == 1.0:
        return mean
    if old is None:
        return step * mean
    old = old.to(mean.device)  # means are of the host, and the base may lie on a GPU
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
        state: Before it.
        link: How the round changes the base.
        carried: Factors that live on.
        ends: Whether the link ends: what is trained next is another thing, so that moments end.
        report: Figures for the ledger.
    """
    sketch, age = state.memo.sketch, state.memo.age + 1
    return replace(
        state,
        base=apply_link(state.base, link, state.plan),
        carried=carried or {},
        memo=replace(state.memo, sketch=sketch + ends, age=0 if ends else age),
        link=link,
        report=report or {},
        notes=(),
    )


def turned(plan: Plan) -> dict[str, int]:
    """Name the weights that are stored (in, out), for recipes that look at a matrix."""
    return {f"turned/{name}": 1 for name, view in plan.targets.items() if view.kind == "conv1d"}


def opening(slot: Trained, like: torch.Tensor) -> torch.Tensor:
    """Return where a factor starts, in the precision and at the place of ``like``.

    Where each client starts elsewhere that is the mean over them.
    """
    start = slot.opening()
    if start is None:
        return torch.zeros(slot.shape).to(like)
    return (start.double().mean(dim=0) if slot.per_client else start).to(like)


def dense_floats(plan: Plan) -> int:
    """Numbers in the tensors of `dense_slots`."""
    return sum(prod(plan.shapes[name]) for name in plan.dense)
