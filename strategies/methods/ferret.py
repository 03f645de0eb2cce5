"""Ferret: plain local training, whose change travels as its shadow on directions drawn from a seed.

    client i: local steps on every weight;  D_i = its change
              gamma_ij = <D_i, z_j> / n_l for the n_l directions of each block l of weights
    server:   W <- W + server_lr sum_j (sum_i p_i gamma_ij) z_j,  block by block

With ``server_lr=1`` the step is unbiased for the mean change, and its squared error is d_l / n_l
times the square of that: smaller steps are the rule where directions are few.

- Uplink: sum_l n_l numbers per client; n_l = ``directions`` times the block's share of the largest
  one, 2 at least. Downlink: a seed; of each round that the client missed, and each block, n_l
  numbers and a seed, or its weights where they are less.
- Aggregation: exact and linear in what is sent. A client's own weights are not what it sends: where
  it stands is known up to the shadow alone.
- Server and each client that was away: n_l d_l draws a block and missed round.
- Client: its local training, and as many draws.
- Source: Shu et al., *Ferret: federated full-parameter tuning at scale for large language models*,
  ICML 2025, arXiv 2409.06277, and its code.
- Departures: z has E[z z^T] = I, by which gamma is unbiased as in the paper; the code's v, within
  +-1/sqrt(d), has E[v v^T] = I / (3 d), so that it recovers server_lr / 3 of a change: its 10 is
  10/3 here. Directions are new in each round, and a block has its own; the code draws all of them
  from one fixed set, a subspace that is never left, whose indices it does not count. Its clip of
  each step at 10, which is not linear, and its momentum of gamma are left out. Blocks are the
  code's: consecutive weights up to nine tenths of the median size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from statistics import median

import torch
from typing_extensions import override

from fedraclora.limits import Count, Limited, Positive
from fedraclora.protocol.method import Draw, Plan, Traits
from fedraclora.protocol.program import ClientChunk
from fedraclora.strategies.shared.walking import MOVES, AlongDirections, Walk, Walking
from fedraclora.tree import Tree


def blocks(
    shapes: Mapping[str, tuple[int, ...]], directions: int
) -> list[tuple[tuple[str, ...], int]]:
    """Cut weights into blocks, and share directions among them, as Ferret's public code does.

    A block takes consecutive weights until it has nine tenths of the median size of one or more;
    the largest gets all directions, others as many as their share of its size, two at least.

    Returns:
        Names and the number of directions of each block.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    enough, found, names = 0.9 * median(sizes.values()), list[tuple[str, ...]](), tuple[str, ...]()
    for name in sizes:
        names = (*names, name)
        if sum(sizes[n] for n in names) >= enough:
            found.append(names)
            names = ()
    if names:
        found.append(names)
    totals = [sum(sizes[n] for n in block) for block in found]
    return [(b, max(directions * t // max(totals), 2)) for b, t in zip(found, totals, strict=True)]


@dataclass(frozen=True)
class ProjectUpdate(AlongDirections, group="method"):
    """Clients train whole weights, and send their change D along directions, block by block.

        gamma_j = <D, z_j> / n for the n directions of a block: sum_j gamma_j z_j is unbiased for D

    Attributes:
        directions: Of the largest block.
    """

    name = "projected_update"

    directions: Count

    @override
    def upload(self, chunk: ClientChunk, before: Tree, after: Tree) -> Tree:
        found, shapes = list[torch.Tensor](), {n: tuple(before[n].shape) for n in self.walk.names}
        changes = {n: (after[n] - before[n]).flatten(1) for n in self.walk.names}
        for names, count in blocks(shapes, self.directions):
            for j in range(count):
                z = {n: self.walk.direction(n, before[n], j).reshape(-1) for n in names}
                along = sum(changes[n] @ z[n].to(changes[n]) for n in names)
                found.append(torch.as_tensor(along) / count)
        return {MOVES: torch.stack(found, dim=1)}


@dataclass(frozen=True)
class Ferret(Limited, Walking, group="method"):
    """Ferret: plain local training; clients send products of the change with random directions.

    Attributes:
        directions: Numbers sent for the largest block of weights (the paper's K).
        server_lr: Step size of the server along the mean.
    """

    directions: Count = 256
    server_lr: Positive = 1.0

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=True, merges=True, varies=True, step=self.server_lr)

    def blocks(self, plan: Plan) -> list[tuple[tuple[str, ...], int]]:
        """Return names and number of directions of each block."""
        return blocks({n: plan.shapes[n] for n in (*plan.weights, *plan.dense)}, self.directions)

    @override
    def shape(self, plan: Plan) -> tuple[int, ...]:
        return (sum(count for _, count in self.blocks(plan)),)

    @override
    def program(self, walk: Walk, round_: int) -> ProjectUpdate:
        return ProjectUpdate(walk, self.directions)

    @override
    def walk(self, plan: Plan, round_: int, draw: Draw) -> Walk:
        return replace(super().walk(plan, round_, draw), law="kaiming_uniform")

    @override
    def applied_moves(self, walk: Walk, mean: torch.Tensor, plan: Plan) -> tuple[Walk, ...]:
        names, counts = zip(*self.blocks(plan), strict=True)
        parts = zip(names, (self.server_lr * mean).split([*counts]), strict=True)
        return tuple(replace(walk, names=n, scalars=part.clone()) for n, part in parts)
