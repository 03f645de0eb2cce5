"""Ferret: plain local training; clients send projections of their update on random directions.

    client i: local steps on every weight;  D_i = its update
              gamma_ij = <D_i, z_j> / n_l for the n_l directions of each block l of weights
    server:   W <- W + server_lr sum_j (sum_i p_i gamma_ij) z_j,  block by block

With ``server_lr=1`` the step is an unbiased estimate of the mean update, and its squared error is
d_l / n_l times the squared norm of that update. Choose a smaller ``server_lr`` if there are few
directions.

- Uplink: sum_l n_l numbers per client. n_l is ``directions`` times the size of block l relative to
  the largest block, and at least 2.
- Downlink: a seed, and for each round that the client missed, per block, n_l numbers and a seed, or
  the block's weights if they are smaller.
- Aggregation: exact and linear in what clients send. The server knows a client's own weights only
  up to the projection.
- Server, and each client that missed rounds: n_l d_l draws per block and missed round.
- Client: its local training, and as many draws.
- Source: Shu et al., *Ferret: federated full-parameter tuning at scale for large language models*,
  ICML 2025, arXiv 2409.06277, and its code.
- Held to: allen4747/Ferret at 1a412a9: whole rounds with training, and the blocks, 3 rounds.
- Departures: all clients use the same directions, as many for each block as its size says, so that
  sums of clients are enough. In the code each client draws its own, more for a block whose update
  is longer. E[z z^T] = I here, so that gamma is unbiased as in the paper. The code draws v within
  +-1/sqrt(d), for which E[v v^T] = I / (3 d), so that it recovers server_lr / 3 of an update: its
  server_lr of 10 is 10/3 here. Each block has new directions in each round. The code draws the
  directions of all rounds from one fixed set, and so never leaves one subspace; it does not count
  the bytes of their indices. The code's clipping of steps at 10, which is not linear, and its
  momentum of gamma are left out. Blocks are the code's.
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
from fedraclora.strategies.shared.walking import (
    MOVES,
    DirectionMethod,
    DirectionProgram,
    DirectionSet,
)
from fedraclora.tree import Tree


def blocks(
    shapes: Mapping[str, tuple[int, ...]], directions: int
) -> list[tuple[tuple[str, ...], int]]:
    """Cut weights into blocks, and assign directions to them, as Ferret's public code does.

    A block takes consecutive weights as long as it has at most nine tenths of the median size of
    one; a larger weight is a block of its own. The largest block gets all directions; the others
    get a number relative to their size, at least two.

    Returns:
        Names and the number of directions of each block.
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    most, found, filled = int(0.9 * median(sizes.values())), list[tuple[str, ...]](), 0
    for name, size in sizes.items():
        if found and filled + size <= most:
            found[-1] = (*found[-1], name)
            filled += size
        else:
            found.append((name,))
            filled = size
    totals = [sum(sizes[n] for n in block) for block in found]
    return [(b, max(directions * t // max(totals), 2)) for b, t in zip(found, totals, strict=True)]


@dataclass(frozen=True)
class ProjectUpdate(DirectionProgram, group="method"):
    """Let clients train whole weights, and send their update D projected on directions, by block.

        gamma_j = <D, z_j> / n for the n directions of a block: sum_j gamma_j z_j is unbiased for D

    Attributes:
        directions: The number of directions of the largest block.
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
class Ferret(Limited, DirectionMethod, group="method"):
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
        """Return the names of the weights and the number of directions of each block."""
        return blocks({n: plan.shapes[n] for n in (*plan.weights, *plan.dense)}, self.directions)

    @override
    def shape(self, plan: Plan) -> tuple[int, ...]:
        return (sum(count for _, count in self.blocks(plan)),)

    @override
    def program(self, walk: DirectionSet, round_: int) -> ProjectUpdate:
        return ProjectUpdate(walk, self.directions)

    @override
    def walk(self, plan: Plan, round_: int, draw: Draw) -> DirectionSet:
        return replace(super().walk(plan, round_, draw), law="kaiming_uniform")

    @override
    def applied_moves(
        self, walk: DirectionSet, mean: torch.Tensor, plan: Plan
    ) -> tuple[DirectionSet, ...]:
        names, counts = zip(*self.blocks(plan), strict=True)
        parts = zip(names, (self.server_lr * mean).split([*counts]), strict=True)
        return tuple(replace(walk, names=n, scalars=part.clone()) for n, part in parts)
