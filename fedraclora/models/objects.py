"""Other people's models: any `torch.nn.Module` of a Python program, or what a function builds."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedraclora.binding import object_of
from fedraclora.data.fingerprint import called_twice
from fedraclora.errors import ConfigError, ModelError, unknown
from fedraclora.imports import check_call, told_as
from fedraclora.lowrank.layers import is_head
from fedraclora.models.built import Built, found_head, require_numbers, seeded, take_module
from fedraclora.objects import register_object, registered_object
from fedraclora.tree import digest

QUICK = 2.0  # seconds of a builder that is called a second time, to see if it draws


def lend_model(model: nn.Module) -> str:
    """Lend a module; give the digest of its weights and its structure.

    Raises:
        ModelError: If it has weights that are no numbers, or does not tell what it is.
    """
    require_numbers(model, "model")
    return register_object(model, model_digest(model))


def model_digest(model: nn.Module) -> str:
    """Hash the weights and the structure of a module.

    Raises:
        ModelError: If it does not tell them.
    """
    with told_as(ModelError, "model: ", "reading its weights"):
        tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        text = f"{type(model).__module__}.{type(model).__qualname__}\n{model!r}\n{digest(tensors)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def copy_of(model: nn.Module, wanted: str | None) -> nn.Module:
    """Copy a module that is lent, as it was when it was lent.

    Raises:
        ConfigError: If it has been changed since.
        ModelError: If it cannot be copied.
    """
    if model_digest(model) != wanted:
        raise ConfigError(
            "the model is no longer what it was when this run was given it (its digest was "
            f"{wanted}): its weights or layers were changed in place; give the run a copy, "
            "copy.deepcopy(model), or the module as it was"
        )
    what, after = "copying it (copy.deepcopy)", "; a run trains a copy"
    with told_as(ModelError, "model: ", what, after):
        return copy.deepcopy(model)


def build_object(
    *,
    digest: str | None,
    head: Sequence[str] | None,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    target_modules: str | Sequence[str] = "all-linear",
) -> Built:
    """Take a module that the program has lent; its weights are the initial ones.

    Args:
        digest: Which, by `lend_model`.
        head: As of `build_function`.
        shape: Not used: the module is as it is.
        classes: Not used.
        seed: Not used: nothing is drawn.
        target_modules: The default pattern of adapted layers.

    Raises:
        ConfigError: If it is not here, was changed, or has no layer that ``head`` names.
        ModelError: If a frozen layer of BatchNorm has never seen a batch, or it cannot be copied.
    """
    del shape, classes, seed
    return _taken(
        copy_of(registered_object("model", digest), digest), "model", head, target_modules
    )


def _taken(
    model: object, where: str, head: Sequence[str] | None, targets: str | Sequence[str]
) -> Built:
    """Take a module, given or built, and find its head; refuse a name that no layer has."""
    module = take_module(model, where)
    every = module.named_parameters(remove_duplicate=False)  # a tied head is a head
    layers = {name.rpartition(".")[0] for name, _ in every} - {""}
    for name in head or ():
        if not any(is_head(layer, (name,)) for layer in layers):
            raise unknown("layer as model.head", name, layers)
    pattern = targets if isinstance(targets, str) else ",".join(targets)
    return Built(module, found_head(module) if head is None else tuple(head), pattern)


def require_module(model: object) -> nn.Module:
    """Reject an object that is not a module.

    Raises:
        ConfigError: Saying what came.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is of type {type(model).__name__}, "
            "expected a torch.nn.Module, the name of a choice "
            "('mlp') or a mapping of its keys"
        )
    return model


def weights_in(found: object) -> object:
    """Take weights and buffers out of what a function gives, by name."""
    return dict(found.state_dict()) if isinstance(found, nn.Module) else None


def build_function(
    *,
    function: str = "",
    head: Sequence[str] | None = None,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    parameters: Mapping[str, object] | None = None,
    target_modules: str | Sequence[str] = "all-linear",
) -> Built:
    """Build what a function of another package gives.

    Args:
        function: ``package.module:function``; it is called with ``shape`` and ``classes`` of the
            data and with ``parameters``, and gives a `torch.nn.Module`. Its draws from torch's
            global generator are fixed by the seed of the run; it may draw from no other. Where
            it takes less than two seconds it is called again to see that. Dropout must be a
            module (`torch.nn.Dropout`): as a function it would stay off, and is refused
            (`fedraclora.models.built`). Layers of BatchNorm must be frozen, that is in evaluation
            mode, with statistics of their own.
        head: Name prefixes of the final layer; None: the last layer that could be adapted, or what
            a model of Hugging Face has beside its encoder; empty: there is none.
        shape: Shape of one input.
        classes: Number of outputs.
        seed: The seed of the run.
        parameters: Further arguments, by name.
        target_modules: The default pattern of adapted layers.

    Raises:
        ConfigError: If it cannot be imported, gives something else, or has no layer that ``head``
            names.
        ModelError: If a frozen layer of BatchNorm has never seen a batch.
    """
    at = "model.parameters"
    build = object_of("model.function", function, parameters=parameters or {}, at=at)
    check_call("model.function", build, shape=shape, classes=classes)

    def called() -> object:
        with (
            seeded(seed, "model"),
            told_as(ModelError, f"model.function={function}: ", "calling it"),
        ):
            return build(shape=shape, classes=classes)

    model = called_twice(f"model.function={function}", called, within=QUICK, look=weights_in)
    return _taken(model, f"model.function={function}", head, target_modules)
