"""Build small random networks: linear, with hidden layers, and convolutional for images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from typing import Annotated

import torch
from torch import nn
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.limits import Count, Fraction, Limit, limited
from fedraclora.models.built import READS_NUMBERS, BuiltModel, require_input, seeded


class Halve(nn.MaxPool2d):
    """Halve images by the maximum of 2 x 2 pixels; fast on a CPU without gradients.

    Without gradients, two elementwise maxima give the same values in an eighth of torch's time.
    Their gradients would differ for equal pixels, so training uses torch's pooling.
    """

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool [..., h, w] to [..., h // 2, w // 2]."""
        if torch.is_grad_enabled() or x.device.type != "cpu":
            pooled: torch.Tensor = super().forward(x)
            return pooled
        height, width = (size // 2 * 2 for size in x.shape[-2:])
        pairs = torch.maximum(x[..., :height, 0:width:2], x[..., :height, 1:width:2])
        return torch.maximum(pairs[..., 0::2, :], pairs[..., 1::2, :])


@READS_NUMBERS
@limited("model")
def build_mlp(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    hidden: Sequence[Count] = (200, 200),
    bias: bool = True,
    dropout: Fraction = 0.0,
) -> BuiltModel:
    """Build linear layers ``fc1``, ``fc2``, ... with ReLU between them.

    Args:
        shape: Shape of one input; it is flattened.
        classes: Number of outputs.
        seed: The seed of the run.
        hidden: Widths of the hidden layers.
        bias: Whether the layers have biases.
        dropout: Probability of dropping a hidden unit.

    Returns:
        The model, with torch's default initialization. The head is the last layer.

    Raises:
        ConfigError: If the data are token ids or an argument is wrong, naming the key.
    """
    features = require_input("mlp", shape, classes, text=False)
    widths = list(hidden)
    if not widths:
        raise ConfigError(
            "model.hidden=[]: at least one hidden layer is wanted; without one, use model=linear"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) > 1:
        layers["flatten"] = nn.Flatten()
    with seeded(seed, "model"):
        for index, (inputs, outputs) in enumerate(pairwise([features, *widths, classes]), start=1):
            layers[f"fc{index}"] = nn.Linear(inputs, outputs, bias=bias)
            if index <= len(widths):
                layers[f"relu{index}"] = nn.ReLU()
                if dropout:
                    layers[f"dropout{index}"] = nn.Dropout(dropout)
    return BuiltModel(nn.Sequential(layers), head=(f"fc{len(widths) + 1}",), targets="all-linear")


@READS_NUMBERS
def build_linear(
    *, shape: tuple[int, ...], classes: int, seed: int, bias: bool = True
) -> BuiltModel:
    """Build one linear layer ``fc1`` from the flattened input to the outputs.

    Args:
        shape: Shape of one input.
        classes: Number of outputs.
        seed: The seed of the run.
        bias: Whether the layer has a bias; the optimum of the synthetic data has none.

    Returns:
        The model. It has no head: its only layer is adapted.

    Raises:
        ConfigError: If the data are token ids.
    """
    features = require_input("linear", shape, classes, text=False)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) > 1:
        layers["flatten"] = nn.Flatten()
    with seeded(seed, "model"):
        layers["fc1"] = nn.Linear(features, classes, bias=bias)
    return BuiltModel(nn.Sequential(layers), head=(), targets="all-linear")


@READS_NUMBERS
@limited("model")
def build_cnn(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    channels: Sequence[Count] = (16, 32),
    hidden: Count | None = 64,
    dropout: Fraction = 0.0,
    kernel: Annotated[Count, Limit("an odd number", lambda size: size % 2 == 1)] = 3,
) -> BuiltModel:
    """Build convolutions ``conv1``, ... and two linear layers, with ReLU between all.

    Each convolution keeps the size of the image and is followed by pooling, which halves the image.

    Args:
        shape: (pixels,) of a square grey image, or (channels, height, width).
        classes: Number of outputs.
        seed: The seed of the run.
        channels: Channels after each convolution.
        hidden: Width of the linear layer ``fc1`` before the head ``fc2``; None: no ``fc1``.
        dropout: Probability of dropping a unit of ``fc1``.
        kernel: Pixels of a side of each convolution.

    Returns:
        The model, with torch's default initialization; convolutions are among the targets.

    Raises:
        ConfigError: If the input is no image, is too small for so many convolutions, or an
            argument is wrong.
    """
    image = _image(shape, classes)
    factor = 2 ** len(channels)
    height, width = image[1] // factor, image[2] // factor
    if not channels or not height or not width:
        raise ConfigError(
            f"model.channels={list(channels)}: at least one convolution is wanted, and not so many "
            f"that nothing is left of {image[1]} x {image[2]} pixels, which each of them halves "
            f"(the shape of an input, {tuple(shape)}, is read as channels, height, width)"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) == 1:
        layers["image"] = nn.Unflatten(1, image)
    with seeded(seed, "model"):
        for index, (before, after) in enumerate(pairwise([image[0], *channels]), start=1):
            layers[f"conv{index}"] = nn.Conv2d(before, after, kernel, padding=kernel // 2)
            layers[f"relu{index}"] = nn.ReLU()
            layers[f"pool{index}"] = Halve(2)
        layers["flatten"] = nn.Flatten()
        features = channels[-1] * height * width
        if hidden is not None:
            layers["fc1"] = nn.Linear(features, hidden)
            layers["relu"] = nn.ReLU()
            if dropout:
                layers["dropout"] = nn.Dropout(dropout)
        layers["fc2"] = nn.Linear(hidden or features, classes)
    return BuiltModel(nn.Sequential(layers), head=("fc2",), targets="all")


def _image(shape: tuple[int, ...], classes: int) -> tuple[int, int, int]:
    """Return (channels, height, width) of an input."""
    numbers = require_input("cnn", shape, classes, text=False)
    side = isqrt(numbers)
    if len(shape) == 1 and side * side == numbers:
        return 1, side, side
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    raise ConfigError(
        f"model=cnn reads images, (channels, height, width) or a square number of pixels; "
        f"this data set has inputs of shape {tuple(shape)}: use model=mlp"
    )
