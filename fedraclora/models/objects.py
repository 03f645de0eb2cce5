"""A model that a Python program has built: any `torch.nn.Module`, or one of Hugging Face."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from fedraclora.errors import ConfigError, unknown
from fedraclora.lowrank.layers import is_head
from fedraclora.models.built import Built, found_head, take_module
from fedraclora.objects import lend, lent
from fedraclora.tree import digest


def lend_model(model: nn.Module) -> str:
    """Lend a module; give the digest of its weights and its structure."""
    tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    text = f"{type(model).__module__}.{type(model).__qualname__}\n{model!r}\n{digest(tensors)}"
    return lend(model, hashlib.sha256(text.encode()).hexdigest()[:32])


def build_object(
    *,
    digest: str | None,
    head: Sequence[str] | None,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    targets: str | Sequence[str] = "all-linear",
) -> Built:
    """Take a module that the program has lent; its weights are the initial ones.

    Args:
        digest: Which, by `lend_model`.
        head: Name prefixes of the final layer; None: the last layer that could be adapted, or what
            a model of Hugging Face has beside its encoder; empty: there is none.
        shape: Not used: the module is as it is.
        classes: Not used.
        seed: Not used: nothing is drawn.
        targets: The default pattern of adapted layers.

    Raises:
        ConfigError: If it is not here, or has no layer that ``head`` names.
        ModelError: If a frozen layer of BatchNorm has never seen a batch.
    """
    del shape, classes, seed
    model = take_module(copy.deepcopy(lent("model", digest)), "model")
    every = model.named_parameters(remove_duplicate=False)  # a tied head is a head
    layers = {name.rpartition(".")[0] for name, _ in every} - {""}
    if head is None:
        head = found_head(model)
    for name in head:
        if not any(is_head(layer, (name,)) for layer in layers):
            raise unknown("layer as model.head", name, layers)
    pattern = targets if isinstance(targets, str) else ",".join(targets)
    return Built(model, tuple(head), pattern)


def require_module(model: object) -> nn.Module:
    """Reject an object that is not a module.

    Raises:
        ConfigError: Saying what came.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is of type {type(model).__name__}; a torch.nn.Module, the name of a choice "
            "('mlp') or a mapping of its keys is wanted"
        )
    return model
