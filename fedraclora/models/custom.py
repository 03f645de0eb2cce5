"""Use a user's model: a `torch.nn.Module` of a Python program, or the result of a function."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from fedraclora.binding import object_of
from fedraclora.data.fingerprint import call_twice
from fedraclora.errors import ConfigError, ModelError, unknown
from fedraclora.imports import as_user_error, check_call
from fedraclora.lowrank.layers import is_head
from fedraclora.models.built import BuiltModel, found_head, require_numbers, seeded, take_module
from fedraclora.object_registry import register_object, registered_object
from fedraclora.tree import digest

QUICK = 2.0  # seconds; a faster builder is called a second time, to detect random draws


def register_model(model: nn.Module) -> str:
    """Register a module; return the digest of its weights and structure.

    Raises:
        ModelError: If it has weights that are no numbers, or no readable structure.
    """
    require_numbers(model, "model")
    return register_object(model, model_digest(model))


def model_digest(model: nn.Module) -> str:
    """Hash the weights and the structure of a module.

    Raises:
        ModelError: If they cannot be read.
    """
    with as_user_error(ModelError, "model: ", "reading its weights"):
        tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        text = f"{type(model).__module__}.{type(model).__qualname__}\n{model!r}\n{digest(tensors)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def copy_of(model: nn.Module, wanted: str | None) -> nn.Module:
    """Copy a registered module, as it was when it was registered.

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
    with as_user_error(ModelError, "model: ", what, after):
        return copy.deepcopy(model)


def build_object(
    *,
    digest: str | None,
    head: Sequence[str] | None,
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    target_modules: str | Sequence[str] = "all-linear",
) -> BuiltModel:
    """Build a model from a registered module, with its weights as initial weights.

    Args:
        digest: The digest that `register_model` returned.
        head: As in `build_function`.
        shape: Not used: the module is as it is.
        classes: Not used.
        seed: Not used: nothing is drawn.
        target_modules: The default pattern of adapted layers.

    Raises:
        ConfigError: If it is not registered here, was changed, or has no layer that ``head`` names.
        ModelError: If a frozen layer of BatchNorm has never seen a batch, or it cannot be copied.
    """
    del shape, classes, seed
    return _taken(
        copy_of(registered_object("model", digest), digest), "model", head, target_modules
    )


def _taken(
    model: object, where: str, head: Sequence[str] | None, targets: str | Sequence[str]
) -> BuiltModel:
    """Check a user's module and find its head; refuse a name that no layer has."""
    module = take_module(model, where)
    every = module.named_parameters(remove_duplicate=False)  # a tied head counts as a head
    layers = {name.rpartition(".")[0] for name, _ in every} - {""}
    for name in head or ():
        if not any(is_head(layer, (name,)) for layer in layers):
            raise unknown("layer as model.head", name, layers)
    pattern = targets if isinstance(targets, str) else ",".join(targets)
    return BuiltModel(module, found_head(module) if head is None else tuple(head), pattern)


def require_module(model: object) -> nn.Module:
    """Reject an object that is not a module.

    Raises:
        ConfigError: Naming its type.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is of type {type(model).__name__}, "
            "expected a torch.nn.Module, the name of a choice "
            "('mlp') or a mapping of its keys"
        )
    return model


def weights_in(found: object) -> object:
    """List the weights and buffers in a function's result, by name."""
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
) -> BuiltModel:
    """Build a model with a function of another package.

    Args:
        function: ``package.module:function``; it is called with ``shape`` and ``classes`` of the
            data and with ``parameters``, and returns a `torch.nn.Module`. Its draws from torch's
            global generator are fixed by the seed of the run; it may use no other generator. A
            call of less than two seconds is repeated to check that. Dropout must be a module
            (`torch.nn.Dropout`): as a function it would be off, and is refused
            (`fedraclora.models.built`). BatchNorm layers must be frozen, that is, in evaluation
            mode with trained statistics.
        head: Name prefixes of the final layer; None: the last layer that can be adapted, or the
            part of a Hugging Face model outside its encoder; empty: no head.
        shape: Shape of one input.
        classes: Number of outputs.
        seed: The seed of the run.
        parameters: Further arguments, by name.
        target_modules: The default pattern of adapted layers.

    Raises:
        ConfigError: If it cannot be imported, returns something else, or has no layer that
            ``head`` names.
        ModelError: If a frozen layer of BatchNorm has never seen a batch.
    """
    at = "model.parameters"
    build = object_of("model.function", function, parameters=parameters or {}, at=at)
    check_call("model.function", build, shape=shape, classes=classes)

    def called() -> object:
        with (
            seeded(seed, "model"),
            as_user_error(ModelError, f"model.function={function}: ", "calling it"),
        ):
            return build(shape=shape, classes=classes)

    model = call_twice(f"model.function={function}", called, within=QUICK, look=weights_in)
    return _taken(model, f"model.function={function}", head, target_modules)
