"""What a model answers to samples, in the words of its data: names of classes, numbers, tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fedraclora.data.fit import as_unscaled
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES, forward
from fedraclora.evaluation.evaluate import numbered_batches, with_weights
from fedraclora.tree import Tree

Prediction = dict[str, object]


def predict(
    model: nn.Module,
    weights: Tree,
    samples: Samples,
    loss: str,
    reading: Mapping[str, Any],
    batch_size: int,
) -> list[Prediction]:
    """Answer every sample, in evaluation mode and without gradients.

    Args:
        model: The network.
        weights: Parameters by name. Batches are moved to their device.
        samples: Whose targets are not looked at.
        loss: For which the model was trained: it says what its outputs are.
        reading: `fedraclora.data.dataset.DataSet.reading`.
        batch_size: Samples per forward pass.

    Returns:
        One record a sample, in their order. ``prediction`` is a class (of each label that applies,
        of each token or each pixel, as a list), a number on the scale of the raw samples, or the
        next token. A class is as the data have it, a name or a number; else it has the name that
        the model itself gives, or its number. ``probability`` beside it is by class, or that of the
        token. Of a loss of another package, whose outputs could be anything, there are ``output``
        alone.
    """
    reading = {"classes": named_outputs(model, loss), **reading}
    call = partial(_answered, loss=loss, reading=reading, batch_size=batch_size)
    return with_weights(model, weights, call, samples)


def named_outputs(model: nn.Module, loss: str) -> list[str]:
    """Name the classes as a model of transformers does; none where its names are the default."""
    labels = getattr(getattr(model, "config", None), "id2label", None) or {}
    default = all(str(name) == f"LABEL_{k}" for k, name in labels.items())
    one_score = loss == "logistic" and len(labels) == 1
    return [] if default or one_score else [str(labels.get(k, k)) for k in range(len(labels))]


def _answered(
    model: nn.Module, samples: Samples, *, loss: str, reading: Mapping[str, Any], batch_size: int
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
    """Classes in their order, and tokens; where there is none, the number.

    A method for each loss says what its outputs, float64, are in words.
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
            said = [self.name(k) for k in (row > 0).nonzero().flatten().tolist()]
            yield {"prediction": said, "probability": self.each(row.sigmoid())}

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
