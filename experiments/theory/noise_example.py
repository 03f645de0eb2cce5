"""A 3 x 3 example: a basis taken from noisy links alone need not find what a drawn one finds.

``f(W) = (w_22^2 + w_33^2) / 2`` with the stochastic gradient ``grad f(W) + xi SIGMA e_1 e_1^T``,
where xi is 1 or -1 with equal chances: L = 1, from W^0 = diag(0, 1, 1), one step of SGD a link.
While |w_ii| < SIGMA each link turns the kept direction towards e_1, where there is noise and
nothing to learn (docs/records/theory.md, section 9). After GoLore (He et al., arXiv 2410.11289),
which shows the like for singular vectors of stochastic gradients.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from fedraclora.data.samples import Partitioned, Samples
from fedraclora.data.task import Task
from fedraclora.experiments.theory.counter_example import SIZE, Array, Trial, follow
from fedraclora.strategies.subspace_rac_lora import SubspaceRacLora
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree

SIGMA = 2.0
SHARE = 0.5  # the step, over 1 / L
LINKS = {"full": 100, "small": 2}


def basis(rank: int, fresh: float, *, pairs: bool = False) -> SubspaceRacLora:
    """Build the method with links of one round and rows of one length."""
    return SubspaceRacLora(rank, float(rank), False, True, "singular", 1, fresh, pairs, 1.0)


METHODS = {
    "kept, r = 1": basis(1, 0.0),
    "pairs, r = 1": basis(1, 0.0, pairs=True),
    "drawn, r = 1": basis(1, 1.0),
    "half kept, r = 2": basis(2, 0.5),
    "drawn, r = 2": basis(2, 1.0),
}


def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``(w_22^2 + w_33^2) / 2 + y w_11`` of each sample [N], and the counts.

    Args:
        output: W^T for each sample, the images of unit vectors, [N, 3, 3].
        target: y, [N].
    """
    w = output.diagonal(dim1=1, dim2=2)
    half = w[:, 1:].square().sum(dim=1) / 2
    return half + target * w[:, 0], torch.ones(len(w), dtype=torch.int64)


def task() -> Task:
    """Build the two samples, y = SIGMA and -SIGMA; a step sees one of them."""
    x = torch.eye(SIZE, dtype=torch.float64).expand(2, -1, -1)
    samples = Samples({"x": x}, torch.tensor([SIGMA, -SIGMA], dtype=torch.float64))
    data = Partitioned.of(samples, [np.arange(2)])
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data = torch.diag(torch.tensor([0.0] + [1.0] * (SIZE - 1)))
    model = nn.Sequential(OrderedDict(fc1=layer)).double()
    return Task(model, (), f"{__name__}:loss", ("loss",), data, samples)


def measure(weights: Tree) -> dict[str, float]:
    """Compute f(W), whose least value is 0."""
    return {"gap": float(weights["fc1.weight"].diagonal()[1:].square().sum() / 2)}


def run(trial: Trial) -> Array:
    """Run the method, and return the gap after each link."""
    local = LocalConfig(lr=trial.share, batch_size=1, steps=1)
    return follow(task(), METHODS[trial.method], local, trial, measure)


def trials(size: str, seeds: int) -> list[Trial]:
    """List every path."""
    return [Trial(m, SHARE, LINKS[size], seed) for m in METHODS for seed in range(seeds)]
