"""Check the values that objects of your program return, so that an error names the object.

A check receives the object's name, its result, the object, and its arguments; it returns the value
to use.
"""

# ruff: noqa: ARG001
from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedraclora.errors import ConfigError, DivergenceError
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.tree import Tree

HookCheck = Callable[[str, Any, Any, tuple[Any, ...]], object]
INTEGERS = (torch.int64, torch.int32)


def describe(found: object) -> str:
    """Describe a value: a tensor by its shape and type, others by their type."""
    if isinstance(found, torch.Tensor):
        return f"a tensor {[*found.shape]} of {str(found.dtype).removeprefix('torch.')}"
    if found is None:
        return "None"
    kind = type(found)
    shown = "" if kind.__repr__ is object.__repr__ or callable(found) else f"{found!r:.60} "
    return f"{shown}of type {kind.__name__}" if shown else f"a {kind.__name__}"


def truth(who: str, found: object, owner: object, given: tuple[Any, ...]) -> bool:
    """Check a truth value; None, from a function without a return, counts as False."""
    one = isinstance(found, torch.Tensor) and found.numel() == 1 and found.dtype == torch.bool
    if one or isinstance(found, bool | np.bool_ | None):
        return bool(found)
    raise ConfigError(f"{who} returns {describe(found)}, expected True or False")


def ids(who: str, found: object, owner: Any, given: tuple[Any, ...]) -> torch.Tensor | None:
    """Check client ids; None: the usual ones."""
    if found is None:
        return None
    count = owner.run.loop.clients
    if isinstance(found, torch.Tensor) and found.dim() == 1 and found.dtype in INTEGERS:
        listed = found.tolist()
        if listed and sorted({*listed}) == listed and listed[0] >= 0 and listed[-1] < count:
            return found.to(torch.int64)
    raise ConfigError(
        f"{who} returns {describe(found)}, expected an int64 tensor of client ids from 0 to "
        f"{count - 1}, at least one, each once, in ascending order"
    )


def norm(who: str, found: object, owner: object, given: tuple[Any, ...]) -> float | None:
    """Check the largest norm of an update; None: no limit."""
    if found is None:
        return None
    real = isinstance(found, numbers.Real) and not isinstance(found, bool)
    try:
        value = float(found) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{who} returns {describe(found)}, expected a positive number or None")
    return value


def of_kind(kind: type, *, optional: bool = False) -> HookCheck:
    """Create a check for a class of the project."""

    def check(who: str, found: object, owner: object, given: tuple[Any, ...]) -> object:
        if isinstance(found, kind) or (optional and found is None):
            return found
        raise ConfigError(f"{who} returns {describe(found)}, expected a {kind.__name__}")

    return check


def state(who: str, found: object, owner: object, given: tuple[Any, ...]) -> object:
    """Check the next state, whose base has the names and shapes of the previous one."""
    of_kind(State)(who, found, owner, given)
    before = next(each for each in given if isinstance(each, State))
    tree(f"{who}: its base", found.base, before.base)  # type: ignore[attr-defined]
    return found


def checked_uplinks(who: str, found: object, owner: object, given: tuple[Any, ...]) -> Uplinks:
    """Check the updates of a cohort; the last given ones define what was sent."""
    if not isinstance(found, Uplinks):
        raise ConfigError(
            f"{who} returns {describe(found)}, expected the Uplinks that it was given"
        )
    uplinks = next(each for each in given if isinstance(each, Uplinks))
    count, size = len(found.clients), uplinks.layout.size
    shapes = {
        "stacked": (found.stacked, [count, size]),
        "summed": (found.summed, [size]),
        "weights": (found.weights, [count]),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None and name != "weights":
            continue
        if not isinstance(tensor, torch.Tensor) or [*tensor.shape] != shape:
            raise ConfigError(
                f"{who} returns {name}: {describe(tensor)}, expected a tensor {shape}"
            )
        if not tensor.is_floating_point():
            raise ConfigError(
                f"{who} returns {name}: {describe(tensor)}, expected floating point numbers"
            )
        if not bool(tensor.isfinite().all()):
            raise DivergenceError(
                f"{who} returns {name} with NaN or infinity, expected finite numbers"
            )
    if found.stacked is None and found.summed is None:
        raise ConfigError(f"{who} returns neither updates nor their sum, expected one of them")
    if bool((found.weights < 0).any()) or not found.total > 0:
        raise ConfigError(
            f"{who} returns the weights {found.weights.tolist()!s:.60}, expected none below "
            "zero and a positive sum"
        )
    return found


def tree(who: str, found: object, wanted: Tree) -> None:
    """Reject tensors whose names or shapes differ from the expected ones.

    Raises:
        ConfigError: Naming the first wrong one.
        DivergenceError: If one is not finite.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(f"{who} returns {describe(found)}, expected a dict of tensors by name")
    if odd := sorted(map(str, found.keys() ^ wanted.keys())):
        raise ConfigError(
            f"{who}: the name {odd[0]!r} is missing or new, expected {', '.join(wanted)}"
        )
    for name, like in wanted.items():
        if found[name] is like:
            continue
        if not isinstance(found[name], torch.Tensor) or found[name].shape != like.shape:
            raise ConfigError(
                f"{who} returns {describe(found[name])} for {name}, expected the shape "
                f"{[*like.shape]}"
            )
        if found[name].is_complex() or found[name].is_floating_point() != like.is_floating_point():
            raise ConfigError(
                f"{who} returns {describe(found[name])} for {name}, expected the type {like.dtype}"
            )
        if not bool(found[name].isfinite().all()):
            raise DivergenceError(f"{who} returns NaN or infinity for {name}")


OF_STEPS: Mapping[str, HookCheck] = {
    "cohort": ids,
    "measurers": ids,
    "send": of_kind(RoundInstructions),
    "bound": norm,
    "receive": of_kind(Uplinks, optional=True),
    "measure": truth,
    "treat": checked_uplinks,
    "close": state,
}
OF_CALLBACKS: Mapping[str, HookCheck] = {"ends": truth}
