"""Define a learning task: a model, an objective, client data and test data.

The objective returns the loss **per sample**, so that losses of a batch with many clients can be
summed per client, and padded samples can be masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedraclora.data.clients import ClientData
from fedraclora.data.own_loss import IGNORED_TOKEN, Losses, OwnLoss, is_own, short_name
from fedraclora.data.samples import Samples
from fedraclora.errors import unknown

LossFunction = Callable[[torch.Tensor, torch.Tensor], Losses]
Slopes = tuple[torch.Tensor, torch.Tensor]  # losses [N], and their gradients at the output
SlopeFunction = Callable[[torch.Tensor, torch.Tensor], Slopes]


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> Losses:
    """Cross-entropy of logits [N, classes] against classes [N]."""
    return F.cross_entropy(output, target, reduction="none"), torch.ones_like(target)


def squared_error(output: torch.Tensor, target: torch.Tensor) -> Losses:
    """Half the squared error: output [N, d] or [N], target [N, d] or [N]; summed over d."""
    gap = (output.reshape(target.shape) - target).reshape(target.shape[0], -1)
    ones = torch.ones(target.shape[0], dtype=torch.int64, device=target.device)
    return 0.5 * (gap * gap).sum(dim=1), ones


def logistic(output: torch.Tensor, target: torch.Tensor) -> Losses:
    """Logistic loss of a score [N, 1] or [N] against labels 0 and 1 [N]."""
    score = output.reshape(target.shape)
    loss = F.binary_cross_entropy_with_logits(score, target.to(score.dtype), reduction="none")
    return loss, torch.ones(target.shape[0], dtype=torch.int64, device=target.device)


def multi_label(output: torch.Tensor, target: torch.Tensor) -> Losses:
    """Logistic loss of every output: scores [N, C] (or [N]) against 0 and 1 [N, C].

    The parts of a sample are its outputs, so that the mean equals that of torch's
    ``binary_cross_entropy_with_logits``.
    """
    scores = output.reshape(target.shape)
    loss = F.binary_cross_entropy_with_logits(scores, target.to(scores.dtype), reduction="none")
    parts = torch.full_like(target[:, 0], target.shape[1], dtype=torch.int64)
    return loss.sum(dim=1), parts


def next_token(output: torch.Tensor, target: torch.Tensor) -> Losses:
    """Cross-entropy of the next token: logits [N, T, V], tokens [N, T] (-100 has no loss)."""
    return token_classes(output[:, :-1], target[:, 1:])


def token_classes(output: torch.Tensor, target: torch.Tensor) -> Losses:
    """Cross-entropy of each token's own class: logits [N, L, C], classes [N, L] (-100: no loss)."""
    return pixel_classes(output.transpose(1, 2), target)


def pixel_classes(output: torch.Tensor, target: torch.Tensor) -> Losses:
    """Cross-entropy of every pixel: logits [N, C, H, W], classes [N, H, W] (-100 has no loss)."""
    loss = F.cross_entropy(output, target, reduction="none", ignore_index=IGNORED_TOKEN)
    return loss.flatten(1).sum(dim=1), (target != IGNORED_TOKEN).flatten(1).sum(dim=1)


def cross_entropy_slope(output: torch.Tensor, target: torch.Tensor) -> Slopes:
    """Compute losses [N] of `cross_entropy` and their gradients [N, classes]."""
    # Elementwise steps: torch's softmax over a few classes is several times slower.
    shifted = output - output.amax(dim=1, keepdim=True)
    of_target = shifted.gather(1, target[:, None])
    slope = shifted.exp_()
    total = slope.sum(dim=1, keepdim=True)
    slope.div_(total).scatter_add_(1, target[:, None], torch.full_like(of_target, -1.0))
    return (total.log() - of_target).squeeze(1), slope


def squared_error_slope(output: torch.Tensor, target: torch.Tensor) -> Slopes:
    """Compute losses [N] of `squared_error` and their gradients, shaped like the output."""
    losses, _ = squared_error(output, target)
    return losses, output - target.reshape(output.shape)


def logistic_slope(output: torch.Tensor, target: torch.Tensor) -> Slopes:
    """Compute losses [N] of `logistic` and their gradients, shaped like the output."""
    losses, _ = logistic(output, target)
    return losses, output.sigmoid() - target.reshape(output.shape).to(output.dtype)


@dataclass(frozen=True)
class Loss:
    """Define a loss, and how its targets and outputs are read.

    Attributes:
        function: Computes loss and number of parts of each sample.
        meaning: A description of its targets.
        metrics: Its usual metrics, the primary one first.
        slope: Computes the losses and their gradients at the output, for training without autograd.
        numbers: Whether the model returns one number for each number of the target.
        axis: Axis of the classes in the outputs of a sample; the other axes are those of its
            target. None without classes.
        each: If a sample has many integer targets, a description of them.
    """

    function: LossFunction
    meaning: str = ""
    metrics: tuple[str, ...] = ("loss",)
    slope: SlopeFunction | None = None
    numbers: bool = False
    axis: int | None = None
    each: str = ""

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> Losses:
        """Compute the loss of each sample, summed over its parts, and its number of parts."""
        return self.function(output, target)


CHOICE_METRICS = ("choice_accuracy", "choice_accuracy_norm")  # of questions with choices
_OF_CLASSES = ("accuracy", "loss")
LOSSES = {
    "cross_entropy": Loss(
        cross_entropy, "one class a sample", _OF_CLASSES, cross_entropy_slope, axis=0
    ),
    "squared_error": Loss(
        squared_error, "numbers to predict", slope=squared_error_slope, numbers=True
    ),
    "logistic": Loss(
        logistic, "one score a sample, for yes or no", _OF_CLASSES, logistic_slope, numbers=True
    ),
    "multi_label": Loss(
        multi_label,
        "yes or no for every output",
        ("f1_micro", "f1_macro", "auc", "loss"),
        numbers=True,
    ),
    "next_token": Loss(
        next_token,
        "each token is to be told from those before it",
        ("accuracy", "perplexity", "loss"),
        axis=-1,
        each="one token id for each token, [N, length]",
    ),
    "token_classes": Loss(
        token_classes,
        "each token has a class of its own",
        ("accuracy", "f1", "loss"),
        axis=-1,
        each="one class for each token, [N, length]",
    ),
    "pixel_classes": Loss(
        pixel_classes,
        "each pixel has a class of its own",
        ("mean_iou", "accuracy", "loss"),
        axis=0,
        each="one class for each pixel, [N, height, width]",
    ),
}
SLOPES = {name: loss.slope for name, loss in LOSSES.items() if loss.slope is not None}


def loss_function(name: str) -> Loss:
    """Return the loss with a name: a key of `LOSSES`, or a user's own.

    Raises:
        ConfigError: If there is none.
    """
    if is_own(name):
        return Loss(OwnLoss.of(name))
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    return LOSSES[name]


def is_binary(target: torch.Tensor) -> bool:
    """Check whether a target contains only 0 and 1."""
    return bool(((target == 0) | (target == 1)).all())


def read_as(loss: str) -> Loss:
    """Return the built-in loss that defines how targets and outputs are read; None if unknown."""
    return LOSSES.get(loss, Loss(squared_error))


@dataclass(frozen=True)
class HeldOutSamples:
    """Hold samples that clients measure on and never train on.

    Attributes:
        data: The samples of each client; some may have none.
        batch_size: Samples of a forward pass.
    """

    data: ClientData
    batch_size: int = 1024


@dataclass(frozen=True)
class Task:
    """Hold everything that a run trains on and is measured by.

    Attributes:
        model: The network; its weights are W^0. Never modified: weights are passed in.
        head: Name prefixes of the final layer (``"fc2"`` or ``"classifier"``).
        loss: A key of `LOSSES`, or the name of one of the user's own.
        metrics: Names of metrics of `fedraclora.evaluation.evaluate.METRICS`; the first is the
            primary one.
        train: Client data.
        test: Held-out samples.
        validation: Samples held out of the training data, for tuning, or None.
        targets: The default pattern of adapted layers, for example ``"all-linear"``.
        optimum: The minimum of the training objective, if known (synthetic data).
        tokenizer: A tokenizer of transformers, if answers can be generated; else None.
        info: Facts for the summary (split, partition, sizes).
        reading: How raw samples are converted for the model, for exports: see `DataSet`; with
            ``shape``, that of one input ``"x"``.
        reader: Reads later samples; None: not supported.
        brought: Returns a client's own object by its id; None: samples are tensors.
        held: The samples that clients measure on; None: no client measures.
        like: The key of `LOSSES` that defines how targets and outputs are read, if ``loss`` is the
            user's own; empty if unknown.
        choices: Number of multiple-choice questions to score; None: none.
    """

    model: nn.Module
    head: tuple[str, ...]
    loss: str
    metrics: tuple[str, ...]
    train: ClientData
    test: Samples
    validation: Samples | None = None
    targets: str = "all-linear"
    optimum: float | None = None
    tokenizer: Any = None
    info: dict[str, object] = field(default_factory=dict)
    reading: dict[str, object] = field(default_factory=dict)
    reader: Any = None  # of `fedraclora.data.dataset`, which is above
    brought: Callable[[int], Any] | None = None
    held: HeldOutSamples | None = None
    like: str = ""
    choices: int | None = None

    @property
    def measured(self) -> tuple[str, ...]:
        """Return the names of its metrics, as in the ledger."""
        more = () if self.choices is None else CHOICE_METRICS
        return (*(short_name(name) if is_own(name) else name for name in self.metrics), *more)

    @property
    def reads(self) -> str:
        """Return the loss that defines how targets and outputs are read."""
        return self.like or self.loss


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Call a plain module (input ``"x"``) or a Hugging Face model; return the output tensor."""
    output = model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}, but must return a tensor or an object "
            "with .logits"
        )
    return logits
