"""Dropout that would do nothing: of a model that has none, or that drops values by a function.

Masks are keyed by seed, round, client and step, which a module (`torch.nn.Dropout`) can be given
from outside and a function cannot: in local training functions stay off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from fedraclora.data.task import forward
from fedraclora.errors import ConfigError

# How functions that drop values take their rate, and whether they are on: name, place, default.
_RATE = ("p", 1, 0.5)
_ON = ("training", 2, True)
_DROPS: dict[Callable[..., Any], tuple[tuple[str, int, float], tuple[str, int, bool]]] = {
    functional.dropout: (_RATE, _ON),
    functional.dropout1d: (_RATE, _ON),
    functional.dropout2d: (_RATE, _ON),
    functional.dropout3d: (_RATE, _ON),
    functional.alpha_dropout: (_RATE, ("training", 2, False)),
    functional.feature_alpha_dropout: (_RATE, ("training", 2, False)),
    torch.dropout: (_RATE, ("train", 2, True)),
    functional.scaled_dot_product_attention: (("dropout_p", 4, 0.0), ("", 99, True)),
}


def refuse_idle_rate(model: nn.Module, dropout: float) -> None:
    """Reject a ``model.dropout`` that no module of the model has taken.

    Raises:
        ConfigError: Naming the model.
    """
    if dropout and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        raise ConfigError(
            f"model.dropout is {dropout}, but {type(model).__name__} has no torch.nn.Dropout that "
            "takes it: it drops nothing, or by a function, which stays off in local training; "
            "leave it at 0.0"
        )


def refuse_functions(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Reject a model that drops values by a function, detected in one forward pass.

    Args:
        model: In training mode. Not modified.
        inputs: Of samples; nothing is checked without any.

    Raises:
        ConfigError: Naming the function and its rate.
    """
    sample = {name: values[:1].clone() for name, values in inputs.items()}
    if not sample or any(not len(values) for values in sample.values()):
        return
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    watch = _Watch()
    with watch, torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            forward(copied, sample)
        except Exception:  # whatever is wrong with it, `fedraclora.models.outputs` says
            return
    if watch.found:
        raise ConfigError(
            f"model.function: the model drops values by {watch.found}, which stays off in local "
            "training; use the module torch.nn.Dropout in its place, or set the rate to 0"
        )


class _Watch(TorchFunctionMode):
    """Notes a function that drops values; empty where there is none."""

    found = ""

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in _DROPS:
            rate, on = (
                named.get(name, args[place] if len(args) > place else default)
                for name, place, default in _DROPS[func]
            )
            if rate > 0 and on:
                self.found = f"{func.__name__} (rate {rate})"
        return func(*args, **named)
