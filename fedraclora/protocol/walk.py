"""Walks: steps of whole weights along drawn directions, of which numbers and a seed travel.

    V <- mu V + sum_p c_kp z_kp;   W <- W + V    for the rows k = 0, 1, ... in turn

All weights of a walk share its numbers c. The direction with number j is one drawing for each
weight, keyed by its name, with E[z z^T] = I; the next row goes on where the last one ended. A walk
is computed in float64, direction by direction, and rounded once, so that whoever takes it has the
same bits on one build. Where there is momentum, V stays beside each weight, as what the last link
trained does (`fedraclora.protocol.factor`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from statistics import median

import torch

from fedraclora.protocol.factor import SEED_BYTES, past_name
from fedraclora.rng import cohort_bits, hash_key
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree

MOVES = "seeds/moves"  # what clients send: numbers, by direction
SUMS = "seeds/sums"  # what stands beside base weights: the numbers of all rounds, by direction
CHANCES = "seeds/chances"  # with which clients draw each direction


@dataclass(frozen=True)
class Walk:
    """Directions of some weights, and how far they go.

    Attributes:
        names: The weights.
        seed: Of all directions.
        first: Number of the first direction.
        law: Of a direction, a key of `fedraclora.sketch.SKETCHES`.
        momentum: mu.
        scalars: c, [rows, directions of a row]; None: nobody has gone yet.
        turned: Those of them that are stored (in, out): their directions are turned as well.
        standing: Whether it is taken from base weights that stay as they are, with the numbers
            that stand beside them under `SUMS`.
    """

    names: tuple[str, ...]
    seed: int
    first: int = 0
    law: str = "gaussian"
    momentum: float = 0.0
    scalars: torch.Tensor | None = None
    turned: tuple[str, ...] = ()
    standing: bool = False

    @property
    def payload_bytes(self) -> int:
        """Bytes of its numbers, and of the seed."""
        return SEED_BYTES + (0 if self.scalars is None else self.scalars.nbytes)

    def direction(self, name: str, like: torch.Tensor, number: int) -> torch.Tensor:
        """Draw a direction of one weight, in its shape: float64 on the CPU, not to be modified."""
        seed = hash_key(self.seed, "direction", name) >> 65
        dim, at = like.numel(), self.first + number
        spec = SketchSpec(self.law, "right", 1, dim, seed, at, normalise="identity")
        drawn = spec.draw()
        return drawn.view(*like.shape[::-1]).mT if name in self.turned else drawn.view(like.shape)

    def along(self, name: str, like: torch.Tensor, scalars: Mapping[int, float]) -> torch.Tensor:
        """Sum directions of one weight, each times its number; float64 on the CPU."""
        total = torch.zeros(like.shape, dtype=torch.float64)
        for number, scalar in scalars.items():
            total.add_(self.direction(name, like, number), alpha=scalar)
        return total

    def taken(self, base: Mapping[str, torch.Tensor]) -> Tree:
        """Compute the weights after the walk, and what stays beside them; ``base`` is kept."""
        given = base.get(SUMS) if self.standing else self.scalars
        if given is None or not given.numel():
            return {}
        rows = given.reshape(-1, given.shape[-1]).tolist()
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


def chances_in(base: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
    """Return the chances of directions as they stand beside base weights; equal at the start."""
    known = base.get(CHANCES, torch.zeros(0))
    return known if known.numel() else torch.ones(count)


def visited(
    seed: int, round_: int, clients: torch.Tensor, steps: int, chances: torch.Tensor
) -> torch.Tensor:
    """Draw which direction a client takes in each local step, with replacement.

    Args:
        seed: Of the walk.
        round_: From 1.
        clients: Ids, int64 [A].
        steps: Local steps.
        chances: Of the directions, [K], which need not add up to one.

    Returns:
        Numbers of directions, int64 [A, steps].
    """
    bits = cohort_bits(hash_key(seed, "visited", round_), clients.cpu(), steps)
    ends = chances.to("cpu", torch.float64).cumsum(0)
    at = (bits.to(torch.float64) + 0.5) * (2.0**-32 * ends[-1])
    return torch.searchsorted(ends, at, right=True).clamp(max=len(ends) - 1)


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
