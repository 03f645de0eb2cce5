"""Steps that several methods share: the tensors trained in full beside the adapters."""

from __future__ import annotations

from math import prod

from fedraclora.method import Plan, State, Trained
from fedraclora.tree import Tree


def dense_slots(state: State) -> dict[str, Trained]:
    """Head, biases and other tensors that the plan trains in full, averaged or kept by clients."""
    plan, shapes = state.plan, state.plan.shapes
    averaged = {name: Trained(shapes[name], main=False) for name in plan.dense}
    return averaged | {name: Trained(shapes[name], main=False, upload=False) for name in plan.local}


def dense_means(state: State, mean: Tree) -> Tree:
    """Averages of the tensors of `dense_slots`, in the precision of the base."""
    return {name: mean[name].to(state.base[name].dtype) for name in state.plan.dense}


def dense_floats(plan: Plan) -> int:
    """Numbers in the tensors of `dense_slots`."""
    return sum(prod(plan.shapes[name]) for name in plan.dense)
