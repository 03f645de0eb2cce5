"""Pools: products under recurring sketches that stand beside a weight, and never in it.

    W_t = W_0 + s sum_j B^(j) A_j        right sketches; left: s sum_j B_j A^(j)

Server and replicas keep each trained part B^(j) among their base weights, under a name of its own.
A link of a pool is the new value of one part: what all links under that sketch add up to, rounded
once at the server. So every replica has the same bits, however many links it has missed, and
fetches each part once (`fedraclora.weights.chain.LinkSizes`). A part of which nothing is trained
yet has no numbers. `Pool.term` alone says how parts add up; it is what clients train beside, what
the server measures, and what is folded into W where a pool ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fedraclora.narrow_weight import is_narrow
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.walk import Walk
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree

Terms = dict[str, Term]


def part_name(weight: str, label: str, place: int) -> str:
    """Name the part of a pool in base weights; parameters have no "/" in their names."""
    return f"{weight}/{label}.{place}"


def parameters(base: Mapping[str, torch.Tensor]) -> Tree:
    """Leave out what is no parameter: the parts of pools, and what the last link trained."""
    return {name: tensor for name, tensor in base.items() if "/" not in name}


@dataclass(frozen=True)
class Pool:
    """What of a pool stands beside one weight.

    Attributes:
        first: The first frozen factor; the others have the numbers after its own.
        count: Parts that have numbers.
        scale: s.
    """

    first: SketchSpec
    count: int
    scale: float

    @classmethod
    def around(cls, sketch: SketchSpec, place: int, size: int, scale: float) -> Pool:
        """Build the pool of ``size`` sketches in which one has the given place."""
        return cls(replace(sketch, index=sketch.index - place), size, scale)

    @property
    def frozen(self) -> Factor:
        """The frozen factors as one."""
        return Factor(sketch=self.first, count=self.count)

    def begun(self, links: int) -> Pool:
        """Keep the parts that have numbers after the first links of an era."""
        return replace(self, count=min(links, self.count))

    def term(self, weight: str, base: Mapping[str, torch.Tensor]) -> Term:
        """Join the parts into one product, of rank K r; the order is that of their numbers."""
        right, frozen = self.first.side == "right", self.frozen
        label, dim = ("B", 1) if right else ("A", 0)
        parts = [base[part_name(weight, label, j)] for j in range(self.count)]
        trained = torch.cat(parts, dim)
        return Term.of((trained, frozen) if right else (frozen, trained), self.scale)


def added(part: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
    """Add up what is trained under one sketch, rounded once; a part without numbers is zero."""
    if not part.numel():
        return more
    return (part.to("cpu", torch.float64) + more.to("cpu", torch.float64)).to(more.dtype)


def fold_pools(
    base: Tree, pools: Mapping[str, Pool], plan: Plan, walk: Walk | None = None
) -> tuple[Tree, Terms]:
    """Fold pools into the weights from which clients train, where these are float32 or wider.

    Args:
        base: Of a replica, with the parts. Not modified.
        pools: By weight.
        plan: Gives each weight's (out, in) view.
        walk: What clients walk along; one that stands beside the weights is taken first.

    Returns:
        The parameters, rounded once; and the terms of narrower ones, which stay beside them.
    """
    terms = {name: pool.term(name, base) for name, pool in pools.items()}
    narrow = {n: t for n, t in terms.items() if is_narrow(base[n])}
    folded = Link({n: t for n, t in terms.items() if n not in narrow})
    gone = walk.taken(base) if walk is not None and walk.standing else {}
    return apply_link(parameters(base | gone), folded, plan), narrow
