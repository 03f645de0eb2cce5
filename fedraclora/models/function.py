"""A model of another package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedraclora.errors import FedRacLoraError, ModelError, unknown
from fedraclora.imports import check_call, failure_of, import_function
from fedraclora.lowrank.layers import is_head
from fedraclora.models.built import Built, seeded, take_module


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
            (`fedraclora.models.dropout`). Layers of BatchNorm must be frozen, that is in evaluation
            mode, with statistics of their own.
        head: Name prefixes of the final layer; empty where there is nothing but one layer.
        shape: Shape of one input.
        classes: Number of outputs.
        seed: The seed of the run.
        arguments: Further arguments.
        targets: The default pattern of adapted layers.

    Raises:
        ConfigError: If it cannot be imported, gives something else, or has no layer that ``head``
            names.
        ModelError: If a frozen layer of BatchNorm has never seen a batch.
    """
    build = import_function("model.function", function)
    check_call("model.function", build, shape=shape, classes=classes, **(arguments or {}))
    with seeded(seed, "model"):
        try:
            model = build(shape=shape, classes=classes, **(arguments or {}))
        except FedRacLoraError:
            raise
        except Exception as error:
            raised = failure_of(error, "calling it")
            raise ModelError(f"model.function={function}: {raised}") from error
    model = take_module(model, f"model.function={function}")
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {""}
    for name in head:
        if not any(is_head(layer, (name,)) for layer in layers):
            raise unknown("layer as model.head", name, layers)
    return Built(model, tuple(head), targets)
