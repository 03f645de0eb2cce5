"""Local optimisers on a whole cohort at once.

State tensors carry the client axis [K, ...]. Unless `fedraclora.training.moments` says otherwise
they live for one round: moments refer to the sketch of the round and would be meaningless under the
next one (axolotl PR 1414 shows what a reset that silently does nothing costs).
"""

from __future__ import annotations

import math

import torch
from typing_extensions import override

from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.row_moments import of_rows, row_entries
from fedraclora.tree import Tree


class CohortOptimiser:
    """SGD or AdamW on tensors [K, ...], with the update rules of ``torch.optim``.

    Args:
        config: Local settings.
        values: The tensors that are trained, [K, ...]; updated in place by `step`.
        rates: Step size of each.
        stored: Moments to begin with, by the names of `fedraclora.training.moments`; none: at zero.
        rows: Second moments of rows to begin with, by name (`fedraclora.training.row_moments`).
    """

    def __init__(
        self,
        config: LocalConfig,
        values: Tree,
        rates: dict[str, float],
        stored: Tree | None = None,
        rows: Tree | None = None,
    ) -> None:
        self.config, self.values, self.rates = config, values, rates
        self.stored = stored or {}
        self.count = 0
        self.before: torch.Tensor | None = None  # steps of each client in earlier rounds
        self.room: torch.Tensor | None = None  # of `_scratch`
        self.first = self._of_kind("first")
        self.second = self._of_kind("second")
        self.unseen: dict[str, float] = {}  # 1 - w of second moments that do not begin at zero
        for name, row in (rows or {}).items():
            self.second[name], self.unseen[name] = row_entries(name, row, values[name])
        if self.stored:
            steps = self.stored["moments/steps"].to(torch.float64)
            alike = bool((steps == steps[0]).all())
            self.count, self.before = (int(steps[0]), None) if alike else (0, steps)

    @property
    def is_plain(self) -> bool:
        """Return whether a step is the gradient times its rate, and nothing else."""
        return self.config.optimiser == "sgd" and not (
            self.config.momentum or self.config.weight_decay
        )

    def _of_kind(self, kind: str) -> Tree:
        prefix = f"moments/{kind}/"
        return {n.removeprefix(prefix): t for n, t in self.stored.items() if n.startswith(prefix)}

    def moments(self, steps: torch.Tensor) -> Tree:
        """Return the moments as they are now, under the names they came by; none if none came.

        Args:
            steps: Steps that each client has taken since, int64 [K].
        """
        return {n: t + steps if n == "moments/steps" else t for n, t in self.stored.items()}

    def rows(self, steps: torch.Tensor) -> Tree:
        """Return the second moments of rows as they are now, by the names they came by, [K, ...].

        Args:
            steps: Steps that each client has taken, int64 [K].
        """
        if not self.unseen:
            return {}
        left = self.config.beta2 ** steps.to(torch.float64)
        return {n: of_rows(n, self.second[n], u * left) for n, u in self.unseen.items()}

    def step(self, gradients: Tree) -> None:
        """Take one step for the clients that still train: the first rows of each tensor.

        Args:
            gradients: [active, ...] for each trained tensor.
        """
        self.count += 1
        for name, gradient in gradients.items():
            self._take(name, self.values[name][: gradient.shape[0]], gradient)

    def _take(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the step of one tensor, [active, ...], with the moments of this name, in place."""
        if self.config.optimiser == "sgd":
            self._sgd(name, value, gradient)
        else:
            self._adamw(name, value, gradient)

    def _sgd(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        config = self.config
        if config.weight_decay:
            gradient = gradient.add(value, alpha=config.weight_decay)
        if config.momentum:
            if name not in self.first:
                self.first[name] = torch.zeros_like(self.values[name])
            buffer = self.first[name][: gradient.shape[0]]
            buffer.mul_(config.momentum).add_(gradient)
            gradient = gradient.add(buffer, alpha=config.momentum) if config.nesterov else buffer
        value.add_(gradient, alpha=-self.rates[name])

    def _adamw(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        config, rate = self.config, self.rates[name]
        if name not in self.first:
            self.first[name] = torch.zeros_like(self.values[name])
        if name not in self.second:
            self.second[name] = torch.zeros_like(self.values[name])
        active = gradient.shape[0]
        first, second = self.first[name][:active], self.second[name][:active]
        if config.weight_decay:
            value.mul_(1 - rate * config.weight_decay)
        first.lerp_(gradient, 1 - config.beta1)
        second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        if self.before is not None:
            counts = (self.before[:active] + self.count).reshape(-1, *[1] * (gradient.dim() - 1))
            root2, step = (1 - config.beta2**counts).sqrt(), rate / (1 - config.beta1**counts)
            scale = (second.sqrt() / root2.to(second)).add_(config.eps)
            value.sub_(step.to(value) * first / scale)
            return
        # All clients that still train have taken the same number of steps.
        correction1 = 1 - config.beta1**self.count
        correction2 = 1 - self.unseen.get(name, 1.0) * config.beta2**self.count
        scale = torch.sqrt(second, out=self._scratch(second))
        scale.div_(math.sqrt(correction2)).add_(config.eps)
        value.addcdiv_(first, scale, value=-rate / correction1)

    def _scratch(self, like: torch.Tensor) -> torch.Tensor:
        """Return room for a tensor, the same for all: fresh memory costs more than the writing."""
        if self.room is None or self.room.numel() < like.numel():
            self.room = like.new_empty(like.numel())
        return self.room[: like.numel()].view(like.shape)


class GradientMean(CohortOptimiser):
    """In the place of an optimiser: sums gradients where that would take steps.

    Clients send gradients of where they start, and take no step (recipe ``gradient``):

        g_k = (1 / T_k) sum_tau grad L(w_0; batch tau of client k),  T_k its local steps

    The batches are those of its local training. The mean over the cohort is then the gradient of
    the loss that the server minimises, up to the batches; it is as large as what would be trained.
    """

    @property
    @override
    def is_plain(self) -> bool:
        return False

    @override
    def step(self, gradients: Tree) -> None:
        self.count += 1
        for name, gradient in gradients.items():
            if name not in self.first:
                self.first[name] = torch.zeros_like(self.values[name])
            self.first[name][: gradient.shape[0]] += gradient

    def means(self, steps: torch.Tensor) -> Tree:
        """Return the mean gradient of each client, [K, ...] by name.

        Args:
            steps: That each client took, int64 [K], in the order of the values.
        """
        counts = steps.clamp(min=1)
        shapes = {n: (-1, *[1] * (t.dim() - 1)) for n, t in self.first.items()}
        return {n: t / counts.reshape(shapes[n]).to(t) for n, t in self.first.items()}
