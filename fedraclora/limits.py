"""Limits of settings, written once, beside the type: ``lr: Positive``, ``epochs: Count | None``.

A dataclass that inherits `Limited`, and a function under `limited`, refuse values beyond them, with
one sentence that names the key, what came and what is wanted. None, where a type allows it, passes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Annotated, ParamSpec, TypeVar

from typing_extensions import override

from fedraclora.errors import ConfigError, unknown

# Of a number in the config: seeds and counts are int64 in tensors, the others float32.
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38

P = ParamSpec("P")
T = TypeVar("T")
# Columns of a ledger's rows, whose names nothing of the user's may have.
COLUMNS = frozenset(
    {"round", "metrics", "validation", "generations", "clients", "train_loss", "train_metrics"}
    | {"cohort", "asked", "dropped", "local_steps", "failures", "attackers", "report", "notes"}
    | {"uplink_bytes", "downlink_bytes", "catchup_bytes", "transport_bytes", "sha256"}
    | {"uplink_total", "downlink_total", "rounding_up", "rounding_down", "effective_step"}
    | {"privacy", "sample_privacy", "secure", "virtual_seconds", "seconds", "cpu_seconds"}
    | {"peak_memory_bytes", "timestamp", "incidents"}
)


@dataclass(frozen=True)
class Limit:
    """What values a setting may have.

    Attributes:
        description: What they are, for messages.
        holds: Whether a value is within; it is asked about values of the annotated type.
        choices: The words that a setting may be, where it is one of a few.
        key: Of the setting, where it is none of its group.
    """

    description: str
    holds: Callable[[typing.Any], bool]
    choices: Collection[str] = ()
    key: str = ""

    def refuse(self, key: str, value: object, kind: object, null: str) -> None:
        """Reject a value that is beyond the limit, or not of the kind of number that it wants.

        Raises:
            ConfigError: Naming the key; for a choice, all choices and the nearest one.
        """
        key = self.key or key
        number = {int: Integral, float: Real}.get(typing.cast("type", kind))
        fits = number is None or (isinstance(value, number) and not isinstance(value, bool))
        if fits and self.holds(value):
            return
        if self.choices:
            raise unknown(key, value, self.choices)
        raise ConfigError(f"{key} is {value!r}; {self.description}{null} is wanted")


@dataclass(frozen=True)
class Composed:
    """What Hydra composes in place of a default: what it resolves, or null, to be said yet."""

    value: str | None = None


@dataclass(frozen=True)
class Later:
    """A key that configs of earlier versions lack: at its default, runs are the same as theirs."""


@dataclass(frozen=True)
class TakesObject:
    """A key whose value may be an object of the user's: ``module:name``, in Python the object."""


@dataclass(frozen=True)
class Part:
    """The part of the keys of a group that only some of its choices list."""

    name: str


def choice_of(choices: Collection[str]) -> Limit:
    """Limit a setting to some words."""
    return Limit("", lambda value: value in choices, choices)


def whole_from(least: int) -> Limit:
    """Limit a whole number from below."""
    return Limit(f"{least} or more", lambda value: value >= least)


def number_from(least: float) -> Limit:
    """Limit a finite number from below."""
    return Limit(f"a finite number from {least:g} on", lambda value: least <= value < math.inf)


_POSITIVE = Limit("a positive finite number", lambda value: 0 < value < math.inf)
Whole = Annotated[int, whole_from(0)]
Count = Annotated[int, whole_from(1)]
Positive = Annotated[float, _POSITIVE]
Seconds = Annotated[float, Limit("a number of seconds above 0", _POSITIVE.holds)]
NotNegative = Annotated[float, number_from(0)]
Share = Annotated[float, Limit("a share in [0, 1]", lambda value: 0 <= value <= 1)]
Fraction = Annotated[float, Limit("a number in [0, 1)", lambda value: 0 <= value < 1)]
Chance = Annotated[float, Limit("a number in (0, 1]", lambda value: 0 < value <= 1)]
Inner = Annotated[float, Limit("a number in (0, 1)", lambda value: 0 < value < 1)]


class Limited:
    """Base of dataclasses whose fields keep to the limits of their types.

    Attributes:
        group: What stands before a field's name in messages; empty where another puts it there.
    """

    group = ""

    @override
    def __init_subclass__(cls, *, group: str | None = None) -> None:
        """Take the group; reject a field that would stand in the place of an inherited method.

        Raises:
            ConfigError: Naming both.
        """
        super().__init_subclass__()
        cls.group = cls.group if group is None else group
        for name in inspect.get_annotations(cls):
            if inspect.isroutine(method := getattr(super(cls, cls), name, None)):
                raise ConfigError(
                    f"{cls.__name__} has a field {name}, and {method.__qualname__} is a method it "
                    "derives: give the field another name"
                )

    def __post_init__(self) -> None:
        """Reject values beyond their limits."""
        check_limits(self.group, type(self), vars(self))


def limited(group: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function refuse arguments beyond the limits of their types.

    Args:
        group: What stands before an argument's name in messages.

    Example:
        >>> @limited("local")
        ... def train(*, epochs: Count) -> int:
        ...     return epochs
        >>> train(epochs=0)
        Traceback (most recent call last):
        ...
        fedraclora.errors.ConfigError: local.epochs is 0; 1 or more is wanted
    """

    def wrap(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            check_limits(group, function, arguments)
            return function(*args, **kwargs)

        return checked

    return wrap


def check_limits(group: str, target: Callable[..., object], values: Mapping[str, object]) -> None:
    """Reject values beyond the limits of the hints of a class or a function.

    Raises:
        ConfigError: Naming the first key, after its group.
    """
    for name, hint in hints(target).items():
        if name in values:
            _check(f"{group}.{name}" if group else name, values[name], hint)


@functools.cache
def hints(target: Callable[..., object]) -> dict[str, object]:
    """Read the types of a class or a function, with their limits, as far as they can be read.

    Somebody may have imported some for mypy alone.
    """
    unread = (NameError, TypeError, AttributeError)
    with contextlib.suppress(*unread):
        return typing.get_type_hints(target, include_extras=True)
    found: dict[str, object] = {}
    for part in reversed(getattr(target, "__mro__", (target,))):
        names = vars(sys.modules.get(part.__module__, typing))
        for key, hint in inspect.get_annotations(part).items():
            with contextlib.suppress(*unread):
                one = types.SimpleNamespace(__annotations__={key: hint})
                found |= typing.get_type_hints(one, names, include_extras=True)
    return found


@functools.cache
def later_keys(target: Callable[..., object]) -> dict[str, object]:
    """List the keys that earlier versions lack (`Later`), each with its default."""
    made = {f.name: f.default_factory for f in fields(target)} if is_dataclass(target) else {}
    found = {}
    for key, hint in hints(target).items():
        if any(isinstance(mark, Later) for mark in getattr(hint, "__metadata__", ())):
            given, make = inspect.signature(target).parameters[key].default, made.get(key, MISSING)
            default = given if make is MISSING else make()
            found[key] = list(default) if isinstance(default, tuple) else default
    return found


def _check(key: str, value: object, hint: object, null: str = "") -> None:
    """Check a value against a hint: its own limit, or those of what it is a union or list of."""
    arguments = typing.get_args(hint)
    if hasattr(hint, "__metadata__"):
        for limit in hint.__metadata__:
            if isinstance(limit, Limit):
                limit.refuse(key, value, arguments[0], null)
        _check(key, value, arguments[0], null)
    elif isinstance(value, list | tuple):
        for place, element in enumerate(value):
            for inner in arguments:
                _check(f"{key}[{place}]", element, inner)
    elif value is not None:
        null = ", or null," if type(None) in arguments else ""
        for option in arguments:
            _check(key, value, option, null)


def check_size(key: str, value: object) -> None:
    """Reject numbers that no tensor holds: they would overflow where they are first used.

    Raises:
        ConfigError: Naming the key and the largest number.
    """
    if isinstance(value, list | tuple):
        for element in value:
            check_size(key, element)
    elif isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ConfigError(f"{key} is {_short(value)}; whole numbers go up to {LARGEST_INT}")
    elif isinstance(value, float) and (
        0 < abs(value) < SMALLEST_FLOAT or LARGEST_FLOAT < abs(value) < math.inf
    ):
        raise ConfigError(
            f"{key} is {value}; it is used as a float32 number, which is 0 or lies between "
            f"{SMALLEST_FLOAT:.2g} and {LARGEST_FLOAT:.2g}"
        )


def _short(value: int) -> str:
    """A whole number of any length, for a message: Python writes no more than 4300 digits."""
    return str(value) if abs(value) < 10**40 else f"a number of {value.bit_length()} bits"
