"""Methods whose clients send numbers along drawn directions of all that is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Cohort, Downlink, Draw, Link, Method, Plan, State, apply_link
from fedraclora.protocol.pool import parameters
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.protocol.walk import MOVES, Walk
from fedraclora.tree import Tree, wide


@dataclass(frozen=True)
class Walking(Method):
    """Base class: a fresh set of directions in each round, along which the server goes the mean."""

    recipe: ClassVar[str] = "forwards"

    @override
    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        if plan.local:
            raise ConfigError(
                f"head is local, but {type(self).__name__} moves all weights along common "
                "directions, and none stays at a client: set head=average, adapt or frozen"
            )
        return State(base, plan)

    def shape(self, plan: Plan) -> tuple[int, ...]:
        """Return the shape of the numbers that a client sends."""
        raise NotImplementedError

    def arguments(self, round_: int) -> dict[str, float | int]:
        """Return the numbers that the recipe reads."""
        raise NotImplementedError

    def walk(self, plan: Plan, round_: int, draw: Draw) -> Walk:
        """Say along which directions a round goes."""
        names = (*plan.weights, *plan.dense)
        first = (round_ - 1) * int(torch.Size(self.shape(plan)).numel())
        stored = (n for n, view in plan.targets.items() if view.kind == "conv1d")
        return Walk(names, draw.sketch_seed("directions"), first, turned=(*stored,))

    @override
    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        return Downlink(
            dense={MOVES: to_train(self.shape(state.plan))},
            recipe=self.recipe,
            arguments=self.arguments(round_),
            walk=self.walk(state.plan, round_, draw),
        )

    def gone(self, walk: Walk, mean: torch.Tensor, plan: Plan) -> tuple[Walk, ...]:  # noqa: ARG002
        """Say how the server goes; ``mean`` is what clients sent, as it is stored."""
        return (replace(walk, scalars=mean),)

    @override
    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        link = Link(walks=self.gone(sent.directions, stored(got.mean()[MOVES], state), state.plan))
        return replace(state, base=apply_link(state.base, link, state.plan), link=link, notes=())

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        return parameters(state.base)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        return torch.Size(self.shape(plan)).numel(), 0


def stored(numbers: torch.Tensor, state: State) -> torch.Tensor:
    """Round numbers to the precision in which clients train."""
    dtype = wide(next(iter(state.base.values())).dtype)
    return numbers.to("cpu", dtype).contiguous()
