"""A linear model: the score of a regression or of a logistic regression."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from fedraclora.models.built import Built, require_input, seeded


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
