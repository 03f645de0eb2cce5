"""Convert the arrays of a Flower app: weights under its names, and how its model is trained."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord
from torch import nn
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import layer_view
from fedraclora.models.built import found_head
from fedraclora.protocol.method import Plan
from fedraclora.protocol.plan import make_plan
from fedraclora.training.own.places import find
from fedraclora.tree import Tree, to_numpy, wide

PEFT = "base_model.model."  # prefix of the names in a PeftModel's state
# factor of a fresh adapter that is zero, so that it adds nothing
ZERO = ("lora_B.weight", "lora_embedding_A.weight")


class LazyWeight(Array):
    """Compute and write a weight only when it is read, which most rounds do not need.

    Args:
        name: The name of the weight.
        like: A tensor of its shape and type.
        weights: Returns all weights.
    """

    def __init__(self, name: str, like: torch.Tensor, weights: Callable[[], Tree]) -> None:
        none = to_numpy(torch.empty(0, dtype=wide(like.dtype)))
        fields = {"dtype": str(none.dtype), "shape": tuple(like.shape), "stype": "numpy.ndarray"}
        self.__dict__ |= fields
        self._name, self._weights = name, weights

    @property
    @override
    def data(self) -> bytes:  # type: ignore[override]
        """Return the bytes in numpy's format."""
        weight = self._weights()[self._name]
        return Array(to_numpy(weight.to(wide(weight.dtype)))).data


def weights_in(
    arrays: ArrayRecord, base: Tree, names: Mapping[str, str], buffers: Container[str]
) -> tuple[Tree, bool]:
    """Read the weights of the app's arrays, and whether they are a PEFT adapter.

    Args:
        arrays: The app's arrays.
        base: The parameters of its model.
        names: All names of each parameter, with the one in ``base``.
        buffers: Names of buffers.

    Raises:
        ConfigError: For a trained adapter, and for names or shapes that are not the model's.
    """
    given = {n: torch.from_numpy(a.numpy()) for n, a in arrays.items()}
    adapter = {n: t for n, t in given.items() if ".lora_" in n}
    if any(n.endswith(ZERO) and t.any() for n, t in adapter.items()):
        raise ConfigError(
            "initial_arrays are a trained adapter, but low-rank rounds start without one. Merge "
            "it into the model first (model.merge_and_unload())."
        )
    rest = {n.removeprefix(PEFT): t for n, t in given.items() if n not in adapter}
    found = {names[n]: t for n, t in rest.items() if n in names}
    odd = [n for n in rest if n not in names and n not in buffers]
    odd += [n for n, t in found.items() if t.shape != base[n].shape]
    lacking = [] if adapter or not arrays else [n for n in base if n not in found]
    if odd or lacking:
        raise ConfigError(
            f"initial_arrays are not a state dict of the model or its adapter: {odd[:3]} are "
            f"unknown, {lacking[:3]} are missing. Give ArrayRecord(model.state_dict())."
        )
    return found, bool(adapter)


def load(model: nn.Module, arrays: ArrayRecord) -> nn.Module:
    """Copy the weights that `LowRank` returns into a model.

    Args:
        model: The app's model; it is changed in place. Of a PeftModel pass the inner model, without
            the adapter, which these weights do not fit: save it as a full model.
        arrays: The arrays of ``evaluate_fn`` or ``Result.arrays``. Those of a fresh PEFT adapter,
            which ``evaluate_fn`` receives in round 0, do not change the inner model.

    Raises:
        ConfigError: If the model has parameters that the arrays lack.
    """
    inside: nn.Module = model.unload() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    fresh = [array for name, array in arrays.items() if name.endswith(ZERO)]
    if inside is not model and fresh and not any(array.numpy().any() for array in fresh):
        return inside
    places = find(inside, {}, "default").parameters
    known = {id(p) for n, p in places.items() if n in arrays}
    if lacking := [n for n, p in places.items() if id(p) not in known]:
        raise ConfigError(f"the arrays lack weights of this model: {lacking[:3]}")
    with torch.no_grad():
        for name in places.keys() & arrays.keys():
            places[name].copy_(torch.from_numpy(arrays[name].numpy()))
    return inside


def planned(
    model: nn.Module, settings: Mapping[str, Any]
) -> tuple[Tree, dict[str, str], Plan, bool]:
    """Choose which parts of a model are trained, and how.

    Returns:
        Its parameters, by plain names; all names of each, tied ones too, with that one; the plan;
        and whether it has LoRA layers of PEFT.
    """
    places = find(model, {}, "default")
    first: dict[int, str] = {}
    names = {n: first.setdefault(id(p), n) for n, p in places.parameters.items()}
    once = {n: places.parameters[n] for n in first.values()}
    base = {n: p.detach() for n, p in once.items()}
    if not places.layers:
        return base, names, make_plan(model, found_head(model), **settings), False
    views = {name: layer_view(layer.base_layer) for name, layer in places.layers.items()}
    full = tuple(n for n, p in once.items() if p.requires_grad and n not in views)
    weights = tuple(n for n in once if not n.endswith("bias") and n not in full)
    shapes = {n: tuple(p.shape) for n, p in once.items()}
    return base, names, Plan(targets=views, dense=full, weights=weights, shapes=shapes), True
