"""What is learnt: a model, an objective, client data and test data.

The objective gives the loss **per sample**, so that a batch that holds many clients can be
summed per client, and a padded sample can be masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fedraclora.data.samples import ClientData, Samples
from fedraclora.errors import ConfigError, unknown
from fedraclora.imports import import_function

# (output, target) -> (loss summed over the parts of each sample [N], number of parts [N])
LossFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

IGNORED_TOKEN = -100  # target of a token or pixel that has no loss, as in torch's cross_entropy


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of logits [N, classes] against classes [N]."""
    return F.cross_entropy(output, target, reduction="none"), torch.ones_like(target)


def squared_error(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error: output [N, d] or [N], target [N, d] or [N]; summed over d."""
    gap = (output.reshape(target.shape) - target).reshape(target.shape[0], -1)
    ones = torch.ones(target.shape[0], dtype=torch.int64, device=target.device)
    return 0.5 * (gap * gap).sum(dim=1), ones


def logistic(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic loss of a score [N, 1] or [N] against labels 0 and 1 [N]."""
    score = output.reshape(target.shape)
    loss = F.binary_cross_entropy_with_logits(score, target.to(score.dtype), reduction="none")
    return loss, torch.ones(target.shape[0], dtype=torch.int64, device=target.device)


def multi_label(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic loss of every output: scores [N, C] (or [N]) against 0 and 1 [N, C].

    The parts of a sample are its outputs, so that a mean is that of torch's
    ``binary_cross_entropy_with_logits``.
    """
    scores = output.reshape(target.shape)
    loss = F.binary_cross_entropy_with_logits(scores, target.to(scores.dtype), reduction="none")
    parts = torch.full_like(target[:, 0], target.shape[1], dtype=torch.int64)
    return loss.sum(dim=1), parts


def next_token(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the next token: logits [N, T, V], tokens [N, T] (-100 has no loss)."""
    return token_classes(output[:, :-1], target[:, 1:])


def token_classes(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each token's own class: logits [N, L, C], classes [N, L] (-100: no loss)."""
    return pixel_classes(output.transpose(1, 2), target)


def pixel_classes(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every pixel: logits [N, C, H, W], classes [N, H, W] (-100 has no loss)."""
    loss = F.cross_entropy(output, target, reduction="none", ignore_index=IGNORED_TOKEN)
    return loss.flatten(1).sum(dim=1), (target != IGNORED_TOKEN).flatten(1).sum(dim=1)


LOSSES: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "logistic": logistic,
    "multi_label": multi_label,
    "next_token": next_token,
    "token_classes": token_classes,
    "pixel_classes": pixel_classes,
}


def loss_function(name: str) -> LossFunction:
    """Return the loss of a name: a key of `LOSSES`, or ``package.module:function``.

    Raises:
        ConfigError: If there is none.
    """
    if ":" in name:
        return _checked(name, import_function("data.loss", name))
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    return LOSSES[name]


def _checked(name: str, function: Callable[..., object]) -> LossFunction:
    """Check what a loss of another package gives, each time: its error would blame the model."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: Any = function(output, target)
        pair = found if isinstance(found, tuple | list) else (found,)
        shapes = [tuple(each.shape) for each in pair if isinstance(each, torch.Tensor)]
        if len(pair) != 2 or shapes != [(len(target),)] * 2:
            came = f"tensors of shape {', '.join(map(str, shapes))}" if shapes else "no tensor"
            raise ConfigError(
                f"data.loss={name} gives {came} for {len(target)} samples; two tensors of shape "
                f"({len(target)},) are wanted: the loss of each sample, summed over its parts, and "
                "how many parts it has (ones, where a sample is one)"
            )
        return pair[0], pair[1]

    return loss


# The same with the slope of each loss at the output, for those who do without autograd.
SlopeFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def cross_entropy_slope(
    output: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [N] of `cross_entropy` and their slopes [N, classes], softmax less one-hot."""
    # In elementwise steps: torch's softmax over a few classes is several times as slow.
    shifted = output - output.amax(dim=1, keepdim=True)
    of_target = shifted.gather(1, target[:, None])
    slope = shifted.exp_()
    total = slope.sum(dim=1, keepdim=True)
    slope.div_(total).scatter_add_(1, target[:, None], torch.full_like(of_target, -1.0))
    return (total.log() - of_target).squeeze(1), slope


def squared_error_slope(
    output: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [N] of `squared_error` and their slopes, shaped like the output."""
    losses, _ = squared_error(output, target)
    return losses, output - target.reshape(output.shape)


def logistic_slope(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [N] of `logistic` and their slopes, shaped like the output."""
    losses, _ = logistic(output, target)
    return losses, output.sigmoid() - target.reshape(output.shape).to(output.dtype)


SLOPES: dict[str, SlopeFunction] = {
    "cross_entropy": cross_entropy_slope,
    "squared_error": squared_error_slope,
    "logistic": logistic_slope,
}


@dataclass(frozen=True)
class HeldOut:
    """What clients measure on, and never train on.

    Attributes:
        data: Of each client; some may have none.
        batch_size: Samples of a forward pass.
    """

    data: ClientData
    batch_size: int = 1024


@dataclass(frozen=True)
class Task:
    """Everything a run learns from and is measured by.

    Attributes:
        model: The network; its weights are W^0. Never modified: weights are passed in.
        head: Name prefixes of the final layer (``"fc2"`` or ``"classifier"``).
        loss: A key of `LOSSES`, or ``package.module:function``.
        metrics: Names of metrics of `fedraclora.evaluation.evaluate.METRICS`; the first is the
            headline.
        train: Client data.
        test: Held-out samples.
        validation: Samples held out of the training data, for tuning, or None.
        targets: The default pattern of adapted layers, for example ``"all-linear"``.
        optimum: The least value of the training objective where it is known (synthetic data).
        tokenizer: Of transformers, where the answers of texts can be generated; else None.
        info: Facts for the summary (split, partition, sizes).
        reading: What raw samples become for the model, for exports: see `DataSet`; with ``shape``,
            that of one input ``"x"``.
        reader: Reads samples that come later; None: nobody does.
        brought: Gives what a client brought as an object, by its id; None: samples are tensors.
        held: What each client measures on; None: none measures.
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
    held: HeldOut | None = None


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Call a plain module (input ``"x"``) or a Hugging Face model; give the output tensor."""
    output = model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"the model returns a {type(output).__name__}; a tensor, or an object with .logits, is "
            "wanted"
        )
    return logits
