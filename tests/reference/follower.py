"""A client in NumPy: what it holds and starts from, by what it was sent alone.

It shares no code with replicas, links or the trainer, whose oracle it is. Of a drawing it knows
the numbers (`fedraclora.sketch`), since both ends draw them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

from fedraclora.protocol.factor import Factor
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.link import Link, Plan
from fedraclora.weights.update import WeightUpdate

Matrix = NDArray[np.float64]


def array(tensor: torch.Tensor) -> Matrix:
    """Copy a tensor in float64."""
    return tensor.double().numpy().copy()


@dataclass
class Follower:
    """A client that follows by updates, in float64.

    Attributes:
        plan: Which weights are matrices, and which are stored transposed.
        held: Weights, and what stands beside them, by name.
        version: Of these.
    """

    plan: Plan
    held: dict[str, Matrix]
    version: int = 0

    def take(self, update: WeightUpdate) -> None:
        """Go on by the links that were missed, or by whole weights."""
        for version, link in update.links:
            if version > self.version:
                self.merge(link)
        self.held |= {name: array(value) for name, value in update.dense.items()}
        self.version = update.version

    def merge(self, link: Link) -> None:
        """Compute W <- W + s B A for each term, and take new values as they are."""
        for name, term in link.terms.items():
            factors = [self.matrix(name, factor) for factor in term.factors]
            self.add(self.held, name, factors, term.scale)
            if term.keep is not None:
                self.held[f"{name}/past"] = factors[term.keep]
        self.held |= {name: array(value) for name, value in link.dense.items()}
        for part in link.rest:
            self.merge(part)

    def start(self, sent: RoundInstructions) -> dict[str, Matrix]:
        """Compute the dense weights from which it trains: with what a pool and factors add."""
        found = {name: W for name, W in self.held.items() if "/" not in name}
        for name, pool in getattr(sent.program, "pools", {}).items():
            label = "B" if pool.first.side == "right" else "A"
            for j in range(pool.count):
                drawn = array(replace(pool.first, index=pool.first.index + j).draw())
                part = self.held[f"{name}/{label}.{j}"]
                pair = [part, drawn] if label == "B" else [drawn, part]
                self.add(found, name, pair, pool.scale)
        for name, adapter in sent.adapters.items():
            factors = [self.matrix(name, factor) for factor in adapter.factors.values()]
            self.add(found, name, factors, adapter.scale)
        begun = {n: f.numbers for n, f in sent.dense.items() if f.numbers is not None}
        return found | {name: array(value) for name, value in begun.items()}

    def add(
        self, weights: dict[str, Matrix], name: str, factors: list[Matrix], scale: float
    ) -> None:
        """Add a product to a weight, or one alone in the shape in which that is stored."""
        product = scale * reduce(np.matmul, factors)
        turned = len(factors) > 1 and self.plan.targets[name].kind == "conv1d"
        weights[name] = weights[name] + (product.T if turned else product)

    def matrix(self, weight: str, factor: Factor) -> Matrix:
        """Compute a factor: numbers, drawings one after another, or C [T; D]."""
        if factor.numbers is not None:
            return array(factor.numbers)
        if factor.sketch is None:
            return np.zeros(factor.shape)
        first, right = factor.sketch, factor.sketch.side == "right"
        each = [array(replace(first, index=first.index + j).draw()) for j in range(factor.count)]
        drawn = np.concatenate(each, axis=0 if right else 1)
        if factor.coefficients is None:
            return drawn
        past, C = self.held[f"{weight}/past"], array(factor.coefficients)
        rows = C @ np.concatenate([past, drawn] if right else [past.T, drawn.T])
        return rows if right else rows.T
