"""Probes: clients send gradients of where they start, and take no step (recipe ``gradient``).

    g_k = (1 / T_k) sum_tau grad L(w_0; batch tau of client k),  T_k its local steps

The batches are those of its local training. The mean over the cohort is then the gradient of the
loss that the server minimises, up to the batches; it is as large as what would be trained.
"""

from __future__ import annotations

import torch
from typing_extensions import override

from fedraclora.training.optimiser import CohortOptimiser
from fedraclora.tree import Tree


class GradientMean(CohortOptimiser):
    """In the place of an optimiser: sums gradients where that would take steps."""

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
