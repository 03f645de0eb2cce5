"""A multi-layer perceptron, and one without hidden layers: a linear model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from fedraclora.errors import ConfigError
from fedraclora.limits import Count, Fraction, limited
from fedraclora.models.built import Built, require_input, seeded


@limited("model")
def build_mlp(
    *,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    hidden: Sequence[Count] = (200, 200),
    bias: bool = True,
    dropout: Fraction = 0.0,
) -> Built:
    """Build linear layers ``fc1``, ``fc2``, ... with ReLU between them.

    Args:
        shape: Shape of one input; it is flattened.
        classes: Number of outputs.
        seed: The seed of the run.
        hidden: Widths of the hidden layers.
        bias: Whether the layers have biases.
        dropout: Probability of dropping a hidden unit.

    Returns:
        The model, with torch's default initialisation. The head is the last layer.

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
    return Built(nn.Sequential(layers), head=(f"fc{len(widths) + 1}",), targets="all-linear")


def build_linear(*, shape: tuple[int, ...], classes: int, seed: int, bias: bool = True) -> Built:
    """Build one linear layer ``fc1`` from the flattened input to the outputs.

    Args:
        shape: Shape of one input.
        classes: Number of outputs.
        seed: The seed of the run.
        bias: Whether the layer has a bias; the optimum of the synthetic data is without.

    Returns:
        The model. It has no head: its only layer is the one to adapt.

    Raises:
        ConfigError: If the data are token ids.
    """
    features = require_input("linear", shape, classes, text=False)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(shape) > 1:
        layers["flatten"] = nn.Flatten()
    with seeded(seed, "model"):
        layers["fc1"] = nn.Linear(features, classes, bias=bias)
    return Built(nn.Sequential(layers), head=(), targets="all-linear")
