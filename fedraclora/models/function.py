"""A model of another package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fedraclora.errors import ConfigError, unknown
from fedraclora.layers import is_head
from fedraclora.models.built import Built, seeded
from fedraclora.named import import_function


def build_function(
    *,
    function: str,
    head: Sequence[str],
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    arguments: Mapping[str, object] | None = None,
    targets: str = "all-linear",
) -> Built:
    """Build what a function of another package gives.

    Args:
        function: ``package.module:function``; it is called with ``shape`` and ``classes`` of the
            data and with ``arguments``, and gives a `torch.nn.Module`. Its draws from torch's
            global generator are fixed by the seed of the run. Dropout must be a module
            (`torch.nn.Dropout`): as a function it would stay off, and is refused
            (`fedraclora.models.dropout`).
        head: Name prefixes of the final layer; empty where there is nothing but one layer.
        shape: Shape of one input.
        classes: Number of outputs.
        seed: The seed of the run.
        arguments: Further arguments.
        targets: The default pattern of adapted layers.

    Raises:
        ConfigError: If it cannot be imported, gives something else, or has no layer that ``head``
            names.
    """
    build = import_function("model.function", function)
    with seeded(seed, "model"):
        model = build(shape=shape, classes=classes, **(arguments or {}))
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.function: {function} gives a {type(model).__name__}; a torch.nn.Module is "
            "wanted"
        )
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    for name in head:
        if not any(is_head(layer, (name,)) for layer in layers):
            raise unknown("layer as model.head", name, layers)
    return Built(model.train(), tuple(head), targets)
