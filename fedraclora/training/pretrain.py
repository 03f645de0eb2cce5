"""Central training of the initial weights, before the federated run."""

from __future__ import annotations

import torch
from torch import nn

from fedraclora.data.samples import Samples
from fedraclora.data.task import forward, loss_function
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.rng import generator


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
    """Train every weight of ``model`` in place with AdamW.

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
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    for epoch in range(epochs):
        order = torch.from_numpy(generator(seed, "pretrain", epoch).permutation(len(train)))
        for rows in order.split(batch_size):
            batch = train.take(rows).trim()
            losses, counts = loss_function(loss)(forward(model, batch.inputs), batch.target)
            optimiser.zero_grad()
            (losses.sum() / counts.sum()).backward()
            optimiser.step()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return evaluate(model, weights, test, loss, metrics)
