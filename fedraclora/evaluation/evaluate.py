"""Measuring a model on held-out samples.

It runs in every round, so a batch costs a forward pass and little else: the sums behind accuracy
and loss stay on the device until the last batch, and outputs are kept only for the metrics that
need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from fedraclora.data.samples import Samples
from fedraclora.data.task import IGNORED_TOKEN, Task, forward, loss_function
from fedraclora.data.token_losses import Labelled, output_layer
from fedraclora.errors import ConfigError, DataError, ShapeError, unknown
from fedraclora.evaluation.metrics import METRICS, Metric, Tally
from fedraclora.tree import Tree

__all__ = ["METRICS", "evaluate"]
Counts = npt.NDArray[np.int64]


def evaluate(
    model: nn.Module,
    weights: Tree,
    samples: Samples,
    loss: str,
    metrics: tuple[str, ...],
    batch_size: int = 1024,
) -> dict[str, float]:
    """Measure a model at the given weights, in evaluation mode and without gradients.

    Accuracy, Matthews' coefficient and F1 read classes: the greatest of the logits [N, C], a
    logistic score above 0, or that of each token or pixel (those with target -100 do not count).
    F1 is that of class 1 for two classes, else the unweighted mean over classes. Pearson's and
    Spearman's coefficients read numbers [N] or [N, 1]; where a side is constant they are NaN.
    For ``multi_label`` an output says yes above 0: ``f1_micro`` is over all of them together,
    ``f1_macro`` and ``auc`` are means over outputs (``auc``: over those that have both answers).
    ``mean_iou`` is the mean over the classes that occur or were predicted.

    Args:
        model: The network. Its buffers, and parameters that ``weights`` does not name, are used
            as they are; nothing of it is changed.
        weights: Parameters by name. Batches are moved to their device.
        samples: What to measure on.
        loss: A key of `fedraclora.data.task.LOSSES`.
        metrics: Keys of `METRICS`.
        batch_size: Samples per forward pass.

    Returns:
        The metrics, in the order that was asked for. ``loss`` is the mean over samples, over
        tokens or pixels with a label, or over outputs for ``multi_label``; ``perplexity`` is its
        exponential.

    Raises:
        ConfigError: If a metric or the loss does not exist, or do not go together.
        DataError: If there are no samples.
        ShapeError: If a weight is not a parameter of the model, or has another shape.
    """
    chosen = _choose(metrics, loss)
    needs = {metric.needs for metric in chosen.values()}
    counted = tally(model, weights, samples, loss, needs, batch_size)
    return {name: metric.compute(counted) for name, metric in chosen.items()}


def evaluate_task(task: Task, weights: Tree, samples: Samples, batch_size: int) -> dict[str, float]:
    """Measure the model of a task as its run does: by `evaluate`, and by ``gap`` where it is known.

    The gap is what the loss on the task's own samples is above the least that there is.
    """
    found = evaluate(task.model, weights, samples, task.loss, task.metrics, batch_size)
    if (
        task.optimum is not None
        and "loss" in found
        and any(samples is own for own in (task.test, task.validation))
    ):
        found["gap"] = found["loss"] - task.optimum
    return found


def tally(
    model: nn.Module, weights: Tree, samples: Samples, loss: str, needs: set[str], batch_size: int
) -> Tally:
    """Pass all samples through a model once and count what metrics need; see `evaluate`.

    Args:
        model: The network.
        weights: Parameters by name.
        samples: What to measure on.
        loss: A key of `fedraclora.data.task.LOSSES`.
        needs: What to count (`fedraclora.evaluation.metrics.Metric.needs`).
        batch_size: Samples per forward pass.

    Returns:
        The counts.

    Raises:
        ConfigError: If the batch size is not positive.
        DataError: If there are no samples.
        ShapeError: If a weight is not a parameter of the model, or has another shape.
    """
    if len(samples) == 0:
        raise DataError("cannot evaluate: there are no samples; give the task a test set")
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    _check_weights(model, weights)
    return with_weights(model, weights, _count, samples, loss, needs, batch_size)


def _choose(metrics: tuple[str, ...], loss: str) -> dict[str, Metric]:
    loss_function(loss)
    for name in metrics:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
        if ":" not in loss and loss not in METRICS[name].losses:  # of others we know nothing
            fitting = ", ".join(sorted(k for k, m in METRICS.items() if loss in m.losses))
            raise ConfigError(
                f"metric {name!r} cannot be computed from the outputs of a model with loss "
                f"{loss!r}; there are: {fitting}"
            )
    return {name: METRICS[name] for name in metrics}


def _check_weights(model: nn.Module, weights: Tree) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, value in weights.items():
        if name not in own:
            raise ShapeError(f"{unknown('parameter', name, own)}: the model does not have it")
        if own[name].shape != value.shape:
            raise ShapeError(
                f"weight {name} has the shape {tuple(value.shape)}, but in the model it has "
                f"{tuple(own[name].shape)}"
            )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set every module to evaluation, and back to its own flag (they may differ)."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def numbered_batches(samples: Samples, size: int) -> Iterator[tuple[torch.Tensor, Samples]]:
    """Cut samples into batches, with the rows that each has.

    They are in stored order, or shortest first where they are padded: sorted by length, a batch
    needs little padding; what is left is trimmed.
    """
    lengths = samples.lengths
    if lengths is None:
        for start in range(0, len(samples), size):
            batch = samples.mapped(itemgetter(slice(start, start + size)))
            yield torch.arange(start, start + len(batch)), batch
        return
    order = torch.argsort(lengths, stable=True)
    ascending: list[int] = lengths[order].tolist()
    for start in range(0, len(samples), size):
        end = min(start + size, len(samples))
        rows_here = order[start:end]
        yield rows_here, samples.take(rows_here).trim(ascending[end - 1])


T = TypeVar("T")


def with_weights(model: nn.Module, weights: Tree, function: Callable[..., T], *given: object) -> T:
    """Call ``function(model, *given)`` while the model has other weights, to evaluate it.

    Swapping weights in costs as much as a batch of a small model: one call serves all batches.
    """
    named = {f"model.{name}": value for name, value in weights.items()}
    with torch.no_grad(), evaluation_mode(model):
        found: T = functional_call(_Calling(model, function), named, given)
    return found


class _Calling(nn.Module):
    """Hands a model to a function: weights are swapped for a call of a module alone."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._function = model, function

    @override
    def forward(self, *given: object) -> Any:
        return self._function(self.model, *given)


def _count(
    model: nn.Module, samples: Samples, loss: str, needs: set[str], batch_size: int
) -> Tally:
    """Count over all batches; what is summed stays on the device until the end."""
    device = next(model.parameters(), samples.target).device
    # Sum of losses, number of parts, right classes, counted classes.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"classes": [], "numbers": []}
    confusion = torch.zeros(0, 0, dtype=torch.int64, device=device)
    classes = 0
    for _, stored in numbered_batches(samples, batch_size):
        for kind, output, target in _outputs(model, loss, stored.to(device)):
            if "loss" in needs:
                losses, parts = loss_function(kind)(output, target)
                sums[:2] += torch.stack([losses.double().sum(), parts.double().sum()])
            if needs & {"correct", "classes", "confusion"}:
                predicted, wanted, classes = _predict(kind, output, target)
                counts = wanted != IGNORED_TOKEN
                if "confusion" in needs:
                    pairs = (wanted * classes + predicted)[counts]
                    table = pairs.bincount(minlength=classes**2).reshape(classes, classes)
                    confusion = table + confusion if len(confusion) else table
                right = (predicted == wanted) & counts
                sums[2:] += torch.stack([right.sum(), counts.sum()])
                if "classes" in needs:
                    kept["classes"].append((predicted[counts], wanted[counts]))
            if "numbers" in needs:
                kept["numbers"].append(_numbers(kind, output, target))
    total, parts_total, correct, counted = sums.tolist()
    return Tally(
        loss=total,
        parts=int(parts_total),
        correct=int(correct),
        counted=int(counted),
        classes=classes,
        labels=_join(kept["classes"]),
        numbers=_join(kept["numbers"]),
        confusion=confusion.cpu().numpy(),
    )


def _outputs(
    model: nn.Module, loss: str, batch: Samples
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Give a loss, outputs and targets: of all samples, or of labelled tokens by the piece."""
    if (head := output_layer(model, loss)) is None:
        yield loss, forward(model, batch.inputs), batch.target
        return
    labelled = Labelled.of(model, head, batch)
    for states, wanted in labelled.pieces():
        yield "cross_entropy", labelled.outputs(states), wanted


def _join(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> npt.NDArray[np.generic]:
    """Concatenate pairs of tensors to an array [2, P, ...]; [2, 0] where none were kept."""
    joined: npt.NDArray[np.generic] = np.empty((2, 0))
    if pairs:
        joined = torch.cat([torch.stack(pair) for pair in pairs], dim=1).cpu().numpy()
    return joined


def _predict(
    loss: str, output: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Predicted classes [P], true classes [P] (`IGNORED_TOKEN`: none), number of classes."""
    if loss == "logistic":
        return (output.reshape(-1) > 0).long(), target.reshape(-1).long(), 2
    over = 1 if loss == "pixel_classes" else -1
    predicted = output.argmax(dim=over)
    if loss == "next_token":
        predicted, target = predicted[:, :-1], target[:, 1:]
    return predicted.flatten(), target.flatten(), output.shape[over]


def _numbers(
    loss: str, output: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted numbers and true numbers, [N], of ``multi_label`` [N, C]; float64."""
    if loss == "multi_label":
        return output.reshape(target.shape).double(), target.double()
    if not output.numel() == target.numel() == target.shape[0]:
        raise ConfigError(
            f"the metric needs one number per sample; the output is {tuple(output.shape)} "
            f"and the target {tuple(target.shape)}"
        )
    return output.reshape(-1).double(), target.reshape(-1).double()


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
