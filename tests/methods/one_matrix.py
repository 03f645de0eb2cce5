"""A round of one method on one matrix, with random replies, and dense algebra beside it."""

from __future__ import annotations

from typing import Any

import torch

from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Method, Plan, RoundInstructions, State
from fedraclora.protocol.program import ClientProgram, GradientStage
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.shared.factors import CoreMethod
from fedraclora.tree import Tree

M, N, R, ALPHA, K = 8, 11, 3, 5.0, 4


S = ALPHA / R


P = torch.tensor([1.0, 2.5, 4.0, 0.5], dtype=torch.float64) / 8


COHORT = Cohort(torch.arange(K), P * 8)


DRAW = Draw(3)


PLAN = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)})


W = torch_normal(generator(0, "weight"), M, N)


class Played:
    """One round of a method with random replies: dense terms by name."""

    def __init__(
        self, method: Method, state: State | None = None, number: int = 1, cohort: Cohort = COHORT
    ) -> None:
        self.method = method
        self.before = state or method.initial_state({"w": W}, PLAN, DRAW)
        self.sent: RoundInstructions = method.open_round(self.before, number, cohort, DRAW)
        layout = self.sent.layout
        rows = torch_normal(generator(number, "replies"), K, layout.size)
        self.uplinks = Uplinks(cohort.clients, cohort.weights, layout, rows)
        self.after = method.close_round(self.before, self.sent, self.uplinks)

    def next(self, number: int) -> Played:
        """The round after this one."""
        return Played(self.method, self.after, number)

    @property
    def mean_product(self) -> torch.Tensor:
        """sum_k p_k B_k A_k."""
        stack = self.uplinks.stack()
        return torch.stack([P[k] * stack["w/B"][k] @ stack["w/A"][k] for k in range(K)]).sum(0)

    @property
    def carried(self) -> torch.Tensor:
        """B A, as the next round starts."""
        return self.after.carried["w/B"] @ self.after.carried["w/A"]

    @property
    def moved(self) -> torch.Tensor:
        """What was merged, over the scale."""
        return (self.after.base["w"] - self.before.base["w"]) / S


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest matrix of a rank, by a dense SVD."""
    U, s, Vt = torch.linalg.svd(matrix)
    return U[:, :rank] * s[:rank] @ Vt[:rank]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def check_cores(method: CoreMethod) -> None:
    """Hold the factors about a core to be orthonormal."""
    factors = Played(method).sent.adapters["w"].factors
    B, A = (factors[label].draw() for label in ("B", "A"))
    core = factors["R"]
    assert core.trained
    eye = torch.eye(core.shape[0]).double()
    close(B.mT @ B, eye)
    close(A @ A.mT, eye)


def changed(program: ClientProgram, *several: Tree) -> list[Tree]:
    """The gradients of one step after another, as a program changes them."""
    none: Any = None  # of a chunk: these do not look at it
    hook = program.hooks(none)[GradientStage.PROGRAM]
    return [hook(gradients, {}) for gradients in several]
