"""Measuring models of which a part stays at the clients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from fedraclora.evaluate import evaluation_mode
from fedraclora.samples import Samples
from fedraclora.task import forward
from fedraclora.tree import Tree

Counts = npt.NDArray[np.int64]


class _Forward(nn.Module):
    """Calls a plain or a Hugging Face model by its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Give the output tensor."""
        return forward(self.model, inputs)


def class_accuracies(
    model: nn.Module, weights: Tree, samples: Samples, classes: int, batch_size: int
) -> npt.NDArray[np.float64]:
    """Accuracy on the samples of each class [classes]; NaN for a class without samples."""
    right = torch.zeros(classes, dtype=torch.float64)
    total = torch.zeros(classes, dtype=torch.float64)
    probe = _Forward(model)
    named = {f"model.{n}": w for n, w in weights.items()}
    with torch.no_grad(), evaluation_mode(model):
        for rows in torch.arange(len(samples), device=samples.target.device).split(batch_size):
            batch = samples.take(rows)
            output = functional_call(probe, named, (batch.inputs,))
            hit = (output.argmax(dim=1) == batch.target).double().cpu()
            target = batch.target.cpu()
            right.index_add_(0, target, hit)
            total.index_add_(0, target, torch.ones_like(hit))
    return (right / total).numpy()


def personal_accuracy(
    model: nn.Module,
    weights: Tree,
    owned: Mapping[int, Tree],
    samples: Samples,
    counts: Counts,
    batch_size: int,
) -> dict[str, float]:
    """Mean accuracy of clients' own models, each under its client's own mix of classes.

    A personal head is for the client's data, so a common test set would punish it for classes
    that the client never sees. Each class's accuracy on the test samples is weighted by the share
    of that class in the client's training data.

    Args:
        model: The network.
        weights: What all share.
        owned: What stays at each client, by id.
        samples: Test samples with class targets.
        counts: Training samples of each class per client [clients, classes].
        batch_size: Samples per forward pass.

    Returns:
        ``personal_accuracy``; nothing without clients.
    """
    if not owned:
        return {}
    scores = []
    for client, own in owned.items():
        mine = weights | {n: t.to(weights[n].device) for n, t in own.items()}
        accuracies = class_accuracies(model, mine, samples, counts.shape[1], batch_size)
        share = counts[client] / counts[client].sum()
        seen = (share > 0) & np.isfinite(accuracies)
        scores.append(float((accuracies[seen] * share[seen]).sum() / share[seen].sum()))
    return {"personal_accuracy": float(np.mean(scores))}
