"""In which precision a model holds its weights while it is adapted."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import nn

from fedraclora.errors import ConfigError
from fedraclora.limits import choice_of
from fedraclora.lowrank.layers import is_head, layer_kind
from fedraclora.models.built import Built
from fedraclora.narrow_weight import BITS, QuantisedWeight, quantised

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Base = Annotated[str, choice_of((*FLOATS, *BITS))]  # what is narrow is never merged into


def held_in(built: Built, base: str) -> Built:
    """Bring the weights of a model to a precision, in place.

    Args:
        built: The model, float32.
        base: ``float32``, ``bfloat16``; or ``int8``, ``int4``: the weights of linear layers alone,
            but for the head and what two layers share. The rest stays float32.

    Raises:
        ConfigError: If nothing can be quantised, or a row does not divide.
    """
    if base in FLOATS:
        built.model.to(FLOATS[base])
    else:
        _quantise(built.model, built.head, base)
    return replace(built, narrow=base != "float32")


def _quantise(model: nn.Module, head: tuple[str, ...], base: str) -> None:
    """Quantise the weights of linear layers; those of Conv1D by their columns, the outputs."""
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    count = 0
    for name, module in model.named_modules():
        kind = layer_kind(module)
        if kind not in {"linear", "conv1d"} or is_head(name, head):
            continue
        weight: nn.Parameter = module.weight
        if every.count(id(weight)) > 1:
            continue
        matrix = weight.detach().mT if kind == "conv1d" else weight.detach()
        found = quantised(matrix.contiguous(), base, f"{name}.weight")
        held = found.mT if kind == "conv1d" else found
        module.weight = nn.Parameter(held, requires_grad=False)
        count += 1
    if not count:
        raise ConfigError(
            f"model.base is {base}, which is for the weights of linear layers, but this "
            f"{type(model).__name__} has none beside its head: take model.base=float32"
        )


def dequantise(model: nn.Module) -> nn.Module:
    """Put dense weights in the place of quantised ones; give the model."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantisedWeight):
            module.weight = nn.Parameter(weight.dequantised(), requires_grad=False)
    return model
