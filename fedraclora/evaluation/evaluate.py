"""Measure a model on held-out samples.

This runs in every round, so a batch costs a forward pass and little else: the sums behind accuracy
and loss stay on the device until the last batch, and outputs are kept only for metrics that need
them.

Predictions use the terms of the data: names of classes, numbers, tokens.
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

from fedraclora.data.encoders.array import as_unscaled
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES, forward
from fedraclora.data.token_losses import LabelledTokens, output_layer
from fedraclora.errors import ConfigError, DataError, ShapeError, unknown
from fedraclora.evaluation.metrics import METRICS, OF_CLASSES, ONE, Measure, RowOwners
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
    like: str = "",
) -> dict[str, float]:
    """Measure a model at the given weights, in evaluation mode and without gradients.

    Accuracy, Matthews' coefficient and F1 read classes: the largest of the logits [N, C], a
    logistic score above 0, or the class of each token or pixel (target -100 does not count).
    For two classes, F1 is that of class 1; for more, the unweighted mean over the classes that
    occur or were predicted. Pearson's and Spearman's coefficients read numbers [N] or [N, 1]; if a
    side is constant they are NaN.
    For ``multi_label`` an output above 0 means yes: ``f1_micro`` is over all outputs together,
    ``f1_macro`` and ``auc`` are means over outputs (``auc``: over outputs with both targets).
    ``mean_iou`` is the mean over the classes that occur or were predicted.

    Args:
        model: The network. Buffers, and parameters that ``weights`` does not name, are used as they
            are; the model is not changed.
        weights: Parameters by name. Batches are moved to their device.
        samples: What to measure on.
        loss: As for `Measure.of`.
        metrics: As for `Measure.of`.
        batch_size: Samples per forward pass.
        like: As for `Measure.of`.

    Returns:
        The metrics in the requested order. ``loss`` is the mean over samples (of half
        the squared distance for ``squared_error``), over tokens or pixels with a label, or over
        outputs for ``multi_label``; ``perplexity`` is its exponential.

    Raises:
        ConfigError: If a metric or the loss does not exist, or the two are incompatible.
        DataError: If there are no samples.
        ShapeError: If a weight is not a parameter of the model, or has another shape.
    """
    measure = Measure.of(metrics, loss, like)
    return measure.values(state_of(model, weights, samples, measure, batch_size))[0]


def state_of(
    model: nn.Module,
    weights: Tree,
    samples: Samples,
    measure: Measure,
    batch_size: int,
    owners: RowOwners = ONE,
) -> Tree:
    """Run all samples through a model once and collect the state of metrics; see `evaluate`.

    Args:
        model: The network.
        weights: Parameters by name.
        samples: What to measure on.
        measure: The metrics.
        batch_size: Samples per forward pass.
        owners: The owners of the samples.

    Returns:
        The state of the metrics, on the device of the weights.

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
    return with_weights(model, weights, _count, samples, measure, batch_size, owners)


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
    """Set every module to evaluation mode, and restore its own flag afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def numbered_batches(samples: Samples, size: int) -> Iterator[tuple[torch.Tensor, Samples]]:
    """Yield batches of samples with their row numbers.

    Batches are in stored order; padded samples are sorted by length, so that a batch needs little
    padding, and the rest is trimmed.
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
    """Call ``function(model, *given)`` while the model has other weights.

    Swapping weights costs as much as a batch of a small model, so one call serves all batches.
    """
    named = {f"model.{name}": value for name, value in weights.items()}
    with torch.no_grad(), evaluation_mode(model):
        found: T = functional_call(_Calling(model, function), named, given)
    return found


class _Calling(nn.Module):
    """Pass a model to a function: torch swaps weights only for the call of a module."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._function = model, function

    @override
    def forward(self, *given: object) -> Any:
        return self._function(self.model, *given)


def _count(
    model: nn.Module, samples: Samples, measure: Measure, batch_size: int, owners: RowOwners
) -> Tree:
    """Collect the state over all batches; sums stay on the device until the end."""
    device = next(model.parameters(), samples.target).device
    of = None if owners.of is None else owners.of.to(device)
    states = []
    for rows, stored in numbered_batches(samples, batch_size):
        here = RowOwners(owners.count, None if of is None else of[rows.to(device)])
        for output, target, whose, loss in _outputs(model, measure, stored.to(device), here):
            states.append(measure.take(output, target, whose, loss))
    return measure.join(states)


def _outputs(
    model: nn.Module, measure: Measure, batch: Samples, owners: RowOwners
) -> Iterator[tuple[torch.Tensor, torch.Tensor, RowOwners, str]]:
    """Return outputs, targets and owners of all samples, or of labelled tokens, and their loss."""
    whole = measure.loss is not LOSSES["next_token"]
    if whole or (head := output_layer(model, "next_token")) is None:
        yield forward(model, batch.inputs), batch.target, owners, ""
        return
    labelled, start = LabelledTokens.of(model, head, batch), 0
    of_row = labelled.kept.nonzero()[:, 0]
    for states, wanted in labelled.pieces():
        rows = of_row[start : start + len(wanted)]
        yield labelled.outputs(states), wanted, owners.repeated(rows), "cross_entropy"
        start += len(wanted)


def class_accuracies(
    model: nn.Module, weights: Tree, samples: Samples, classes: int, batch_size: int
) -> npt.NDArray[np.float64]:
    """Compute accuracy on the samples of each class, [classes]; NaN for a class without samples."""
    measure = Measure.of(("f1",), "cross_entropy")
    state = state_of(model, weights, samples, measure, batch_size)
    right, _, total = state[OF_CLASSES.name].cpu().numpy().reshape(3, -1)[:, :classes]
    return np.where(total > 0, right / np.maximum(total, 1), np.nan)


def personal_accuracy(
    model: nn.Module,
    weights: Tree,
    owned: Mapping[int, Tree],
    samples: Samples,
    counts: Counts,
    batch_size: int,
) -> dict[str, float]:
    """Compute the mean accuracy of personal models, each under its client's class distribution.

    A personal head is for the client's data, so a common test set would punish it for classes
    that the client never sees. Each class's accuracy on the test samples is weighted by the share
    of that class in the client's training data.

    Args:
        model: The network.
        weights: The shared weights.
        owned: The personal tensors of each client, by id.
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


Prediction = dict[str, object]


def predict(
    model: nn.Module,
    weights: Tree,
    samples: Samples,
    loss: str,
    reading: Mapping[str, Any],
    batch_size: int,
) -> list[Prediction]:
    """Predict every sample, in evaluation mode and without gradients.

    Args:
        model: The network.
        weights: Parameters by name. Batches are moved to their device.
        samples: The samples; targets are ignored.
        loss: The loss of training, which defines the meaning of outputs.
        reading: `fedraclora.data.dataset.DataSet.reading`.
        batch_size: Samples per forward pass.

    Returns:
        One record per sample, in order. ``prediction`` is a class (or a list: of the labels that
        apply, of all tokens or of all pixels), a number on the scale of the raw samples, or the
        next
        token. A class has the name or number of the data; else the model's name for it, or its
        number. ``probability`` is by class, or that of the token. For a loss of another package,
        with outputs of any meaning, there is only ``output``.
    """
    reading = {"classes": named_outputs(model, loss), **reading}
    return with_weights(model, weights, _answered, samples, loss, reading, batch_size)


def named_outputs(model: nn.Module, loss: str) -> list[str]:
    """Return a transformers model's class names; empty if they are its defaults."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    default = all(str(name) == f"LABEL_{k}" for k, name in labels.items())
    one_score = loss == "logistic" and len(labels) == 1
    return [] if default or one_score else [str(labels.get(k, k)) for k in range(len(labels))]


def _answered(
    model: nn.Module, samples: Samples, loss: str, reading: Mapping[str, Any], batch_size: int
) -> list[Prediction]:
    device = next(model.parameters(), samples.target).device
    found: dict[int, Prediction] = {}
    for rows, stored in numbered_batches(samples, batch_size):
        batch = stored.to(device)
        outputs = forward(model, batch.inputs).double()
        words: Iterator[Prediction] = ({"output": row.tolist()} for row in outputs)
        if loss in LOSSES:
            words = getattr(_Words(reading), loss)(outputs.cpu(), batch.to("cpu"))
        found.update(zip(rows.tolist(), words, strict=True))
    return [found[row] for row in range(len(samples))]


class _Words:
    """Convert outputs to names of classes, numbers and tokens; to indices if there are no names.

    Each loss has a method that converts its outputs, float64.
    """

    def __init__(self, reading: Mapping[str, Any]) -> None:
        self.classes, self.symbols = reading.get("classes", []), reading.get("symbols", "")
        self.scale: Mapping[str, Any] | None = reading.get("target")

    def name(self, k: int) -> Any:
        return self.classes[k] if k < len(self.classes) else k

    def each(self, row: torch.Tensor) -> dict[str, float]:
        return {str(self.name(k)): value for k, value in enumerate(row.tolist())}

    def nested(self, found: Any) -> Any:
        return [*map(self.nested, found)] if isinstance(found, list) else self.name(found)

    def cross_entropy(self, outputs: torch.Tensor, _: Samples) -> Iterator[Prediction]:
        for row in outputs.softmax(dim=-1):
            yield {"prediction": self.name(int(row.argmax())), "probability": self.each(row)}

    def logistic(self, outputs: torch.Tensor, _: Samples) -> Iterator[Prediction]:
        for score in outputs.flatten():
            both = torch.stack([-score, score]).sigmoid()
            yield {"prediction": self.name(int(score > 0)), "probability": self.each(both)}

    def multi_label(self, outputs: torch.Tensor, _: Samples) -> Iterator[Prediction]:
        for row in outputs.reshape(len(outputs), -1):
            names = [self.name(k) for k in (row > 0).nonzero().flatten().tolist()]
            yield {"prediction": names, "probability": self.each(row.sigmoid())}

    def squared_error(self, outputs: torch.Tensor, _: Samples) -> Iterator[Prediction]:
        for row in outputs if self.scale is None else as_unscaled(outputs, self.scale):
            yield {"prediction": float(row) if row.numel() == 1 else row.tolist()}

    def next_token(self, outputs: torch.Tensor, batch: Samples) -> Iterator[Prediction]:
        lengths = batch.lengths
        last = torch.full((len(outputs),), outputs.shape[1]) if lengths is None else lengths
        for row in outputs[torch.arange(len(outputs)), last - 1].softmax(dim=-1):
            k = int(row.argmax())
            token = self.symbols[k] if k < len(self.symbols) else k
            yield {"prediction": token, "probability": float(row.max())}

    def token_classes(self, outputs: torch.Tensor, batch: Samples) -> Iterator[Prediction]:
        mask = batch.inputs.get("attention_mask", torch.ones(outputs.shape[:2])) != 0
        for row, real in zip(outputs.argmax(dim=-1), mask, strict=True):
            yield {"prediction": self.nested(row[real].tolist())}

    def pixel_classes(self, outputs: torch.Tensor, _: Samples) -> Iterator[Prediction]:
        yield from ({"prediction": self.nested(row)} for row in outputs.argmax(dim=1).tolist())
