"""Normal numbers that a test can name: the same in each run, other ones under another key."""

from __future__ import annotations

import torch

from fedraclora.rng import generator, torch_normal


def normal(*shape: int, seed: int = 0, key: str | int = "x") -> torch.Tensor:
    """Draw float64 normals; other numbers for another shape, seed or key."""
    return torch_normal(generator(seed, key, *shape), *shape)
