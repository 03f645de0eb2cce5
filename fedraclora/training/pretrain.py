"""Central training of the initial weights, before the federated run."""

from __future__ import annotations

import torch
from torch import nn

from fedraclora.data.samples import Samples
from fedraclora.data.task import forward, loss_function
from fedraclora.rng import generator
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimiser import CohortOptimiser


def pretrain(model: nn.Module, train: Samples, loss: str, local: LocalConfig, seed: int) -> None:
    """Train every weight of ``model`` in place, as a cohort of one.

    With AdamW to the bits of `torch.optim.AdamW`, which imports torch's compiler: a second of every
    start.

    Args:
        model: The network.
        train: What it learns from.
        loss: A key of `fedraclora.data.task.LOSSES`.
        local: The optimiser, its step size, the samples of a step and the passes over ``train``.
        seed: Of the run; orders the samples.
    """
    cohort = {n: p.detach()[None] for n, p in model.named_parameters()}
    optimiser = CohortOptimiser(local, cohort, dict.fromkeys(cohort, local.lr))
    for epoch in range(local.epochs):
        order = torch.from_numpy(generator(seed, "pretrain", epoch).permutation(len(train)))
        for rows in order.split(local.batch_size):
            batch = train.take(rows).trim()
            losses, counts = loss_function(loss)(forward(model, batch.inputs), batch.target)
            model.zero_grad()
            (losses.sum() / counts.sum()).backward()
            found = {n: p.grad[None] for n, p in model.named_parameters() if p.grad is not None}
            optimiser.step(found)
