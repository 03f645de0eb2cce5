"""DP-SGD on one client, sample after sample: the oracle of `fedraclora.privacy.sample_level`."""

from __future__ import annotations

import torch

from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.tree import Tree


def set_noisy_gradients(each: torch.Tensor, values: Tree, dp: SampleNoise, noise: Tree) -> None:
    """Set the gradient of every value to the noisy mean over a batch.

    Args:
        each: The loss of each sample, [b], with their graph.
        values: What is trained, leaves of that graph.
        dp: Clip and noise.
        noise: Standard normals in the shapes of ``values``.
    """
    total = {name: torch.zeros_like(value) for name, value in values.items()}
    for loss in each:
        found = torch.autograd.grad(loss, list(values.values()), retain_graph=True)
        norm = float(torch.linalg.vector_norm(torch.cat([g.reshape(-1) for g in found])))
        share = min(1.0, dp.clip / norm) if norm else 1.0
        for name, gradient in zip(values, found, strict=True):
            total[name] += share * gradient
    for name, value in values.items():
        noisy = total[name] + dp.noise_multiplier * dp.clip * noise[name]
        value.grad = (noisy / len(each)).to(value)
