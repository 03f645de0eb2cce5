"""Define limits of settings as types: ``lr: Positive``, ``epochs: Count | None``.

A dataclass that inherits `Limited`, and a function decorated with `limited`, refuse values beyond
them; the message names the key, the value and the limit. None passes if the type allows it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

from annotated_types import BaseMetadata, Ge, Gt, Le, Lt
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.schema import hints, parts_of_type, validated

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core.core_schema import CoreSchema

P = ParamSpec("P")
T = TypeVar("T")
# Columns of a ledger's rows, whose names are reserved.
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
    """Restrict the values of a type by a condition, if no bound of a number describes it.

    Attributes:
        description: The allowed values, for messages.
        holds: Whether a value is allowed; it is called with values of the annotated type.
    """

    description: str
    holds: Callable[[Any], bool]

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """See pydantic."""
        from pydantic_core import PydanticCustomError, core_schema

        def check(value: object) -> object:
            if not self.holds(value):
                raise PydanticCustomError("limit", "beyond its limit")
            return value

        return core_schema.no_info_after_validator_function(check, handler(kind))

    def __get_pydantic_json_schema__(self, kind: Any, handler: GetJsonSchemaHandler) -> Any:
        """See pydantic."""
        return {**handler(kind), "description": self.description}


@dataclass(frozen=True)
class OneOf:
    """Restrict a text to some choices.

    Attributes:
        choices: The choices.
        others: Whether other texts are also allowed.
    """

    choices: Collection[str]
    others: bool = False

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """See pydantic."""
        from pydantic_core import core_schema

        return handler(kind) if self.others else core_schema.literal_schema([*self.choices])


@dataclass(frozen=True)
class ConfigKey:
    """Name the config key of a parameter, if it differs from the parameter's name."""

    key: str

    def __get_pydantic_json_schema__(self, kind: Any, handler: GetJsonSchemaHandler) -> Any:
        """See pydantic."""
        return {**handler(kind), "key": self.key}


@dataclass(frozen=True)
class HydraDefault:
    """Replace a default in Hydra's composition: a value that Hydra resolves, or null."""

    value: str | None = None


@dataclass(frozen=True)
class AddedKey:
    """Mark a key added after the first release; its default keeps old runs reproducible."""


@dataclass(frozen=True)
class AcceptsObject:
    """Mark a key whose value may be a user's object: ``module:name``, in Python the object."""


@dataclass(frozen=True)
class Part:
    """Mark keys of a group that only some of its choices list."""

    name: str


Whole = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]
Seconds = Positive
NotNegative = Annotated[float, Ge(0), Lt(math.inf)]
Share = Annotated[float, Ge(0), Le(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Chance = Annotated[float, Gt(0), Le(1)]
Inner = Annotated[float, Gt(0), Lt(1)]


class Limited:
    """Base of dataclasses whose fields check the limits of their types.

    Attributes:
        group: Prefix of a field's name in messages; empty if the caller adds it.
    """

    group = ""

    @override
    def __init_subclass__(cls, *, group: str | None = None) -> None:
        """Set the group; reject a field that would replace an inherited method.

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
    """Decorate a function to refuse arguments beyond the limits of their types.

    Args:
        group: Prefix of an argument's name in messages.

    Example:
        >>> @limited("local")
        ... def train(*, epochs: Count) -> int:
        ...     return epochs
        >>> train(epochs=0)
        Traceback (most recent call last):
        ...
        fedraclora.errors.ConfigError: local.epochs=0: expected 1 or more
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

    Types without a limit are not checked, and numbers may be of numpy, since values may come from
    Python code. Defaults of the class are not checked.

    Raises:
        ConfigError: Naming the first key, after its group.
    """
    said = {k: values[k] for k in _limited(target) if k in values}
    default = {k: getattr(target, k, MISSING) for k in said}
    validated(group, target, {k: _number(v) for k, v in said.items() if v is not default[k]})


@functools.cache
def _limited(target: Callable[..., object]) -> tuple[str, ...]:
    """List the parameters whose types have limits."""
    marks = (Limit, OneOf, BaseMetadata)
    kinds = hints(target).items()
    return tuple(k for k, kind in kinds if any(isinstance(x, marks) for x in parts_of_type(kind)))


def _number(value: object) -> object:
    """Convert numbers of other libraries to Python's."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


@functools.cache
def later_keys(target: Callable[..., object]) -> dict[str, object]:
    """List the keys that earlier versions lack (`AddedKey`), with their defaults."""
    made = {f.name: f.default_factory for f in fields(target)} if is_dataclass(target) else {}
    found = {}
    for key, hint in hints(target).items():
        if any(isinstance(mark, AddedKey) for mark in getattr(hint, "__metadata__", ())):
            given, make = inspect.signature(target).parameters[key].default, made.get(key, MISSING)
            default = given if make is MISSING else make()
            found[key] = list(default) if isinstance(default, tuple) else default
    return found
