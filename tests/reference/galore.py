"""GaLore for one client, written to be read: matrices in NumPy, one after another.

It shares no code with `fedraclora.training.moments`, whose oracle it is. The lines are those of
algorithm 2 of arXiv 2403.03507, with the optimizer of ``torch.optim`` for rho.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from fedraclora.protocol.method import RoundInstructions
from fedraclora.strategies.methods.galore_average import ProjectGradients
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree

Matrix = NDArray[np.float64]


class LocalGalore:
    """SGD or AdamW, some of whose gradients are projected.

    Args:
        local: Settings.
        values: What is trained, with gradients; updated in place.
        downlink: Says which weights are projected, and how.
        rate_scale: Of the step sizes.
    """

    def __init__(
        self, local: LocalSettings, values: Tree, downlink: RoundInstructions, rate_scale: float
    ) -> None:
        self.local, self.values = local, values
        self.program = cast(ProjectGradients, downlink.program)
        slots = downlink.trained()
        self.rates = {n: local.rate(slots[n].main, rate_scale) for n in values}
        self.state: dict[str, dict[str, Any]] = {n: {"M": 0.0, "V": 0.0} for n in values}
        self.t = 0

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for value in self.values.values():
            value.grad = None

    def step(self) -> None:
        """Take one step."""
        for name, value in self.values.items():
            W = self.matrix(name, value.detach())
            assert value.grad is not None
            G = self.matrix(name, value.grad)
            W = W + self.change(name, W, G)
            new = torch.from_numpy(np.ascontiguousarray(W.T if self.turned(name) else W))
            with torch.no_grad():
                value.copy_(new.reshape(value.shape))
        self.t += 1

    def turned(self, name: str) -> bool:
        return name in self.program.turned

    def matrix(self, name: str, stored: torch.Tensor) -> Matrix:
        """A tensor as (out, in); one that is not projected, as it is."""
        array: Matrix = stored.numpy()
        if name not in self.program.ranks:
            return array
        return array.T if self.turned(name) else array.reshape(len(array), -1)

    def change(self, name: str, W: Matrix, G: Matrix) -> Matrix:
        """What a step adds to a weight."""
        local, rate = self.local, self.rates[name]
        decay = 0.0 if local.optimizer == "sgd" else rate * local.weight_decay
        if local.optimizer == "sgd":
            G = G + local.weight_decay * W
        if name not in self.program.ranks:
            return -decay * W - rate * self.rho(name, G)
        m, n = W.shape
        if self.t % self.program.gap == 0:
            self.state[name]["P"] = self.projector(G, self.program.ranks[name])
        P = self.state[name]["P"]
        lifted = P @ self.rho(name, P.T @ G) if m <= n else self.rho(name, G @ P) @ P.T
        return -decay * W - rate * self.program.scale * lifted

    def projector(self, G: Matrix, rank: int) -> Matrix:
        """The leading singular vectors of the smaller side, the largest entry of each positive."""
        U, s, Vt = np.linalg.svd(G)
        sides = U if G.shape[0] <= G.shape[1] else Vt.T
        columns = []
        for column, value in zip(sides.T, s[:rank], strict=False):
            there = value > 10 * max(G.shape) * np.finfo(float).eps * s[0]
            columns.append(column * np.sign(column[np.abs(column).argmax()]) * there)
        return np.stack(columns, axis=1)

    def rho(self, name: str, R: Matrix) -> Matrix:
        """The direction of the optimizer for a gradient, which is stepped against."""
        local, state, t = self.local, self.state[name], self.t + 1
        if local.optimizer == "sgd":
            state["M"] = local.momentum * state["M"] + R
            return R + local.momentum * state["M"] if local.nesterov else state["M"]
        state["M"] = local.beta1 * state["M"] + (1 - local.beta1) * R
        state["V"] = local.beta2 * state["V"] + (1 - local.beta2) * R**2
        corrected = state["M"] / (1 - local.beta1**t)
        return corrected / (np.sqrt(state["V"] / (1 - local.beta2**t)) + local.eps)
