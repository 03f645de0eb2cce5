"""Define methods whose clients send numbers along random directions of all trained weights.

    V <- mu V + sum_p c_kp z_kp;   W <- W + V    for the rows k = 0, 1, ... in turn

All weights of a walk share its numbers c. The direction with number j is one drawing for each
weight, keyed by its name, with E[z z^T] = I; the next row continues the numbering. A walk is
computed in float64, direction by direction, and rounded once, so that every copy has the same bits
on one build. With momentum, V stays beside each weight, like the last trained factor
(`fedraclora.protocol.factor`).

Clients that look along directions train the numbers c, by differences of losses without a backward
pass. Local step t of a client looks along P directions:

    g_p = (L(W + eps z_p) - L(W - eps z_p)) / (2 eps)      the gradient of c_p is g_p / P
    W <- W + sum_j (c_j - c_j before) z_j                  (with V between, under momentum)

The optimizer steps on c: SGD and its momentum on c equal those on W. All clients of a chunk look at
once, in two forward passes a direction, with the same dropout in both. The reported loss is the
mean of the two, up to eps^2 that of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.limits import Count, Positive
from fedraclora.protocol.factor import SEED_BYTES, past_name, to_train
from fedraclora.protocol.link import Move
from fedraclora.protocol.method import (
    Cohort,
    Draw,
    Link,
    Method,
    Plan,
    RoundInstructions,
    State,
    apply_link,
)
from fedraclora.protocol.program import (
    PLAIN,
    ClientChunk,
    ClientProgram,
    Forward,
    GradientFunction,
    mean_losses,
)
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import hash_key
from fedraclora.sketch import SketchSpec, check_sketch
from fedraclora.tree import Tree, parameters, wide
from fedraclora.wire.fields import whole_number

MOVES = "seeds/moves"  # clients' numbers, by direction


@dataclass(frozen=True)
class DirectionSet(Move):
    """Describe directions of some weights, and the numbers along them.

    Attributes:
        seed: The seed of all directions.
        first: Number of the first direction.
        law: Distribution of a direction, a key of `fedraclora.sketch.SKETCHES`.
        momentum: mu.
        scalars: c, [rows, directions of a row]; None: no step yet.
        turned: Weights that are stored (in, out); their directions are transposed, too.
    """

    name = "walk"

    seed: int
    first: int = 0
    law: str = "gaussian"
    momentum: float = 0.0
    scalars: torch.Tensor | None = None
    turned: tuple[str, ...] = ()

    @property
    @override
    def payload_bytes(self) -> int:
        return SEED_BYTES + (0 if self.scalars is None else self.scalars.nbytes)

    @property
    @override
    def keeps_direction(self) -> bool:
        return self.momentum > 0

    def direction(self, name: str, like: torch.Tensor, number: int) -> torch.Tensor:
        """Draw a direction of one weight, in its shape: float64 on the CPU, not to be modified."""
        seed = hash_key(self.seed, "direction", name) >> 65
        dim, at = like.numel(), self.first + number
        spec = SketchSpec(self.law, "right", 1, dim, seed, at, normalize="identity")
        drawn = spec.draw()
        return drawn.view(*like.shape[::-1]).mT if name in self.turned else drawn.view(like.shape)

    def along(self, name: str, like: torch.Tensor, scalars: Mapping[int, float]) -> torch.Tensor:
        """Sum directions of one weight, each times its number; float64 on the CPU."""
        total = torch.zeros(like.shape, dtype=torch.float64)
        for number, scalar in scalars.items():
            total.add_(self.direction(name, like, number), alpha=scalar)
        return total

    @override
    def taken(self, base: Mapping[str, torch.Tensor]) -> Tree:
        if self.scalars is None or not self.scalars.numel():
            return {}
        rows = self.scalars.reshape(-1, self.scalars.shape[-1]).tolist()
        steps = [
            {k * len(row) + p: scalar for p, scalar in enumerate(row) if scalar}
            for k, row in enumerate(rows)
        ]
        out: Tree = {}
        for name in self.names:
            weight, past = base[name], base.get(past_name(name))
            W = weight.to("cpu", torch.float64, copy=True)
            V = torch.zeros_like(W) if past is None else past.to(W, copy=True)
            for step in steps:
                move = self.along(name, W, step)
                W += V.mul_(self.momentum).add_(move) if self.momentum else move
            out[name] = W.to(weight)
            if self.momentum:
                out[past_name(name)] = V.to(weight)
        return out


@dataclass(frozen=True)
class DirectionProgram(ClientProgram, group="method"):
    """Clients train whole weights, and send numbers along directions instead.

    Attributes:
        walk: The directions.
    """

    moves_weights = True

    walk: DirectionSet

    @property
    @override
    def payload_bytes(self) -> int:
        return self.walk.payload_bytes

    @property
    @override
    def keeps_direction(self) -> bool:
        return self.walk.keeps_direction

    @override
    def check(self, downlink: RoundInstructions) -> None:
        check_walk(self.walk)

    @override
    def trained_model(self, downlink: RoundInstructions, plan: Plan) -> RoundInstructions:
        names = self.walk.names
        dense = {n: to_train(plan.shapes[n], main=n in plan.weights) for n in names}
        return replace(downlink, dense=dense, program=PLAIN)


def check_walk(walk: DirectionSet) -> None:
    """Reject directions of a message that cannot be drawn.

    Raises:
        WireError: Naming the field.
    """
    whole_number(walk.seed, "the seed of its directions")
    whole_number(walk.first, "the number of its first direction")
    check_sketch(walk.law, "identity", "independent")


@dataclass(frozen=True)
class FiniteDifferences(DirectionProgram, group="method"):
    """Clients train the numbers along directions, by differences of losses.

    Attributes:
        eps: How far a client looks along a direction.
        directions: Directions of a local step.
    """

    forms_gradients = True

    eps: Positive
    directions: Count

    @property
    def by_direction(self) -> bool:
        """Return whether a number is sent for each direction; False: for each look along one."""
        return False

    @property
    @override
    def stream(self) -> str:
        return "forwards"

    @override
    def most_steps(self, downlink: RoundInstructions) -> int | None:
        return None if self.by_direction else downlink.layout.size // self.directions

    @override
    def gradient_function(self, chunk: ClientChunk, base: Tree, steps: int) -> GradientFunction:
        return FiniteDifferenceGradients(self, chunk, base, steps)

    def choose_directions(
        self,
        chunk: ClientChunk,  # noqa: ARG002
        base: Tree,  # noqa: ARG002
        size: int,
        steps: int,  # noqa: ARG002
    ) -> torch.Tensor:
        """Choose the direction of each look, int64 [1 or K, looks]; here a different one each."""
        return torch.arange(size)[None]


class FiniteDifferenceGradients:
    """Compute the gradients of the numbers of a chunk of clients, and move their weights.

    Args:
        program: How clients look.
        chunk: The clients; its values are the numbers.
        base: The weights from which they start, with the tensors beside them.
        steps: The most local steps of a client.
    """

    def __init__(
        self, program: FiniteDifferences, chunk: ClientChunk, base: Tree, steps: int
    ) -> None:
        self.program, self.walk = program, program.walk
        values = chunk.values[MOVES]
        K, size = len(values), int(values[0].numel())
        self.drawn = program.choose_directions(chunk, base, size, steps)
        # The direction of each number: [1, size] if clients share them.
        self.numbers = torch.arange(size)[None] if program.by_direction else self.drawn
        self.weights = {n: base[n].expand(K, *base[n].shape).clone() for n in self.walk.names}
        self.moving: Tree = {}
        if self.walk.momentum:
            zeros = {n: torch.zeros_like(base[n]) for n in self.walk.names}
            past = {n: base.get(past_name(n), zeros[n]) for n in self.walk.names}
            self.moving = {n: t.expand(K, *t.shape).clone() for n, t in past.items()}
        self.seen = values.flatten(1).clone()

    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        """Compute losses and gradients, as in `ClientProgram.gradients`; then weights move."""
        del width
        values, eps, count = chunk.values[MOVES], self.program.eps, self.program.directions
        if step:
            self._follow(values.flatten(1)[:active])
        gradient = torch.zeros_like(self.seen[:active])
        total = torch.zeros(active, dtype=gradient.dtype, device=gradient.device)
        for place in range(step * count, (step + 1) * count):
            drawn = self.drawn[:active, place]
            at = drawn if self.program.by_direction else torch.full_like(drawn, place)
            z = {n: self._stacked(n, drawn) for n in self.walk.names}
            up, down = (self._losses(forward, z, active, side) for side in (eps, -eps))
            slope = (up - down) / (2 * eps * count)
            at = at.to(gradient.device).expand(active)[:, None]
            gradient.scatter_(1, at, slope[:, None].to(gradient))
            total += (up + down) / (2 * count)
        return total, {MOVES: gradient.view(active, *values.shape[1:])}

    def _losses(self, forward: Forward, z: Tree, active: int, eps: float) -> torch.Tensor:
        """Compute the mean loss of each client on its batch, eps along its direction."""
        with torch.no_grad():
            there = {n: torch.add(w[:active], z[n], alpha=eps) for n, w in self.weights.items()}
            return mean_losses(*forward(there, {}))

    def _stacked(self, name: str, drawn: torch.Tensor) -> torch.Tensor:
        """Draw a direction of a weight for each client, [active or 1, ...]."""
        weight = self.weights[name]
        each = {j: self.walk.direction(name, weight[0], j) for j in set(drawn.tolist())}
        return torch.stack([each[j] for j in drawn.tolist()]).to(weight)

    def _follow(self, now: torch.Tensor) -> None:
        """Move weights by the optimizer's change of the numbers."""
        active = len(now)
        moved, self.seen = (now - self.seen[:active]).cpu(), now.clone()
        columns = moved.any(dim=0).nonzero().flatten().tolist()
        for name, weight in self.weights.items():
            part, like = weight[:active], (-1, *[1] * (weight.dim() - 1))
            if self.moving:
                self.moving[name][:active] *= self.walk.momentum
            for column in columns:
                drawn = self.numbers[: active if len(self.numbers) > 1 else 1, column]
                step = self._stacked(name, drawn) * moved[:, column].view(like).to(weight)
                (self.moving[name][:active] if self.moving else part).add_(step)
            if self.moving:
                part.add_(self.moving[name][:active])


@Feature(
    "a method that moves all weights along shared random directions",
    avoids={"head=personal": "all weights move, so none can stay at a client"},
)
@dataclass(frozen=True)
class DirectionMethod(Method):
    """Base of methods with new directions each round, along which the server moves."""

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        return State(base, plan)

    @override
    def _merges(self) -> bool:
        return True

    def shape(self, plan: Plan) -> tuple[int, ...]:
        """Return the shape of the numbers that a client sends."""
        raise NotImplementedError

    def program(self, walk: DirectionSet, round_: int) -> DirectionProgram:
        """Return the clients' program for the directions of a round."""
        raise NotImplementedError

    def walk(self, plan: Plan, round_: int, draw: Draw) -> DirectionSet:
        """Return the directions of a round."""
        names = (*plan.weights, *plan.dense)
        first = (round_ - 1) * int(torch.Size(self.shape(plan)).numel())
        stored = (n for n, view in plan.targets.items() if view.kind == "conv1d")
        return DirectionSet(names, draw.sketch_seed("directions"), first, turned=(*stored,))

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        walk = self.walk(state.plan, round_, draw)
        slot = to_train(self.shape(state.plan))
        return RoundInstructions(dense={MOVES: slot}, program=self.program(walk, round_))

    def applied_moves(
        self,
        walk: DirectionSet,
        mean: torch.Tensor,
        plan: Plan,  # noqa: ARG002
    ) -> tuple[DirectionSet, ...]:
        """Return the server's move; ``mean`` is the clients' mean, as it is stored."""
        return (replace(walk, scalars=mean),)

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        link = Link(
            moves=self.applied_moves(
                walk_of(sent), stored(uplinks.mean()[MOVES], state), state.plan
            )
        )
        return replace(state, base=apply_link(state.base, link, state.plan), link=link, notes=())

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        return parameters(state.base)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        return torch.Size(self.shape(plan)).numel(), 0


def walk_of(sent: RoundInstructions) -> DirectionSet:
    """Return the directions in the instructions of such a method."""
    return cast(DirectionProgram, sent.program).walk


def stored(numbers: torch.Tensor, state: State) -> torch.Tensor:
    """Round numbers to the precision in which clients train."""
    dtype = wide(next(iter(state.base.values())).dtype)
    return numbers.to("cpu", dtype).contiguous()
