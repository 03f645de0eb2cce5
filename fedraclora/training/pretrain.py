"""Central training of the initial weights, before the federated run."""

from __future__ import annotations

import torch
from torch import nn

from fedraclora.data.samples import Samples
from fedraclora.data.task import forward, loss_function
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.rng import generator
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimiser import CohortOptimiser


def pretrain(
    model: nn.Module,
    train: Samples,
    test: Samples,
    loss: str,
    metrics: tuple[str, ...],
    *,
    seed: int,
    epochs: int,
    lr: float,
    batch_size: int,
) -> dict[str, float]:
    """Train every weight of ``model`` in place with AdamW, as a cohort of one.

    To the bits of `torch.optim.AdamW`, which imports torch's compiler: a second of every start.

    Args:
        model: The network.
        train: What it learns from.
        test: What it is measured on afterwards.
        loss: A key of `fedraclora.data.task.LOSSES`.
        metrics: Of the test.
        seed: Of the run; orders the samples.
        epochs: Passes over ``train``.
        lr: Step size.
        batch_size: Samples per step.

    Returns:
        Metrics on ``test``.
    """
    weights = {n: p.detach() for n, p in model.named_parameters()}
    cohort = {n: w[None] for n, w in weights.items()}
    adamw = LocalConfig(optimiser="adamw", weight_decay=0.01)
    optimiser = CohortOptimiser(adamw, cohort, dict.fromkeys(cohort, lr))
    for epoch in range(epochs):
        order = torch.from_numpy(generator(seed, "pretrain", epoch).permutation(len(train)))
        for rows in order.split(batch_size):
            batch = train.take(rows).trim()
            losses, counts = loss_function(loss)(forward(model, batch.inputs), batch.target)
            model.zero_grad()
            (losses.sum() / counts.sum()).backward()
            found = {n: p.grad[None] for n, p in model.named_parameters() if p.grad is not None}
            optimiser.step(found)
    return evaluate(model, weights, test, loss, metrics)
