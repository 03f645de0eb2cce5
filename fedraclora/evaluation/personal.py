"""Measuring models of which a part stays at the clients."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import nn

from fedraclora.data.samples import Samples
from fedraclora.evaluation.evaluate import tally
from fedraclora.tree import Tree

Counts = npt.NDArray[np.int64]


def class_accuracies(
    model: nn.Module, weights: Tree, samples: Samples, classes: int, batch_size: int
) -> npt.NDArray[np.float64]:
    """Accuracy on the samples of each class [classes]; NaN for a class without samples."""
    counted = tally(model, weights, samples, "cross_entropy", {"classes"}, batch_size)
    predicted, actual = counted.labels.astype(np.int64)
    right = np.bincount(actual[predicted == actual], minlength=classes)
    total = np.bincount(actual, minlength=classes)
    return np.where(total > 0, right / np.maximum(total, 1), np.nan)


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
        counts: Training samples of each class at each of these clients [len(owned), classes].
        batch_size: Samples per forward pass.

    Returns:
        ``personal_accuracy``; nothing without clients.
    """
    if not owned:
        return {}
    scores = []
    for own, count in zip(owned.values(), counts, strict=True):
        mine = weights | {n: t.to(weights[n].device) for n, t in own.items()}
        accuracies = class_accuracies(model, mine, samples, counts.shape[1], batch_size)
        share = count / count.sum()
        seen = (share > 0) & np.isfinite(accuracies)
        scores.append(float((accuracies[seen] * share[seen]).sum() / share[seen].sum()))
    return {"personal_accuracy": float(np.mean(scores))}
