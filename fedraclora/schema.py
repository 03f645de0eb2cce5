"""Check values against signatures by pydantic, and report errors in the terms of the config.

The parameters of a function, or the fields of a dataclass, with their types and limits
(`fedraclora.limits`), are the schema of a group of keys. Types are strict: true is no number and 1
is no text, but a whole number may stand for a fraction.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass

from fedraclora.errors import ConfigError, MissingKeysError, UnreadKeysError, unknown
from fedraclora.renamed import renamed

if typing.TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, TypeAdapter
    from pydantic_core import ValidationError
    from pydantic_core.core_schema import CoreSchema, ValidationInfo

# Of a number in the config: seeds and counts are int64 in tensors, the others float32.
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1.2e-38
KNOWN = (bool, int, float, str, list, dict, Mapping, Sequence, object, type(None))
# Types as a config file calls them.
WORDS = {"integer": "int", "number": "float", "string": "str", "boolean": "bool", "null": "null"}

T = typing.TypeVar("T")
Target = Callable[..., object]
Schema = Mapping[str, typing.Any]  # JSON Schema


class Chosen:
    """A class of which a nested group of the config chooses one: ``{name: lognormal, median: 1}``.

    ``name`` is a row of `rows`; the other keys are that row's arguments. A row does not know where
    it is nested: what it refuses begins with its own key, and gets the whole path here.
    """

    @classmethod
    def rows(cls) -> Mapping[str, Target]:
        """Return the table: name -> class."""
        raise NotImplementedError

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, _: GetCoreSchemaHandler) -> CoreSchema:
        """See pydantic."""
        from pydantic_core import PydanticCustomError, core_schema

        def choose(value: object, info: ValidationInfo) -> object:
            if isinstance(value, cls):
                return value
            if not isinstance(value, Mapping):
                raise PydanticCustomError("chosen_type", "a group is wanted")
            key, table = path(typing.cast("str", info.context), str(info.field_name)), cls.rows()
            name, keys = value.get("name"), {k: v for k, v in value.items() if k != "name"}
            if not isinstance(name, str) or name not in table:
                raise unknown(key, name, table)
            row = bound(key, table[name], keys)
            try:
                return row()
            except ConfigError as error:
                raise ConfigError(f"{key}.{error}") from error

        return core_schema.with_info_plain_validator_function(choose)

    @classmethod
    def __get_pydantic_json_schema__(cls, *_: object) -> dict[str, object]:
        """See pydantic."""
        return {"title": f"a group with a name ({', '.join(cls.rows())})"}


def path(kind: str, key: str) -> str:
    """Join a group and a key of it; of the config itself the group is empty."""
    return f"{kind}.{key}" if kind else key


def bound(
    kind: str,
    target: Callable[..., T],
    group: Mapping[str, object],
    given: Mapping[str, object] = types.MappingProxyType({}),
    *,
    whole: bool = True,
) -> Callable[..., T]:
    """Bind the keys of a group as arguments of a call, each checked.

    Args:
        kind: The group's key, for messages.
        target: The function or class to call.
        group: The group, without its ``name``.
        given: Arguments that the config does not set; a key of the group wins over them.
        whole: Whether the call needs no further arguments.

    Returns:
        The call, ready to be made.

    Raises:
        UnreadKeysError: For a key that ``target`` does not take.
        MissingKeysError: Naming all keys that have no default and are missing.
        ConfigError: For a value of the wrong type, or beyond its limits.
    """
    needed, any_key = {p.name: p for p in parameters(target)}, takes_any(target)
    arguments = {key: value for key, value in given.items() if any_key or key in needed}
    arguments |= checked_values(kind, target, group)
    missing = [k for k, p in needed.items() if p.default is p.empty and k not in arguments]
    if missing and whole:
        raise _missing(kind, target, missing)
    return functools.partial(target, **arguments)


def checked_values(kind: str, target: Target, values: Mapping[str, object]) -> dict[str, object]:
    """Check values of some parameters of a call, and give them in its types.

    Args:
        kind: Prefix of a parameter's name in messages; empty: none.
        target: A class or a function.
        values: Values by parameter; missing parameters are not required.

    Raises:
        UnreadKeysError: For a key that ``target`` does not take.
        ConfigError: For the first value of the wrong type, or beyond its limits: naming the key,
            what came and what.
    """
    for key, value in values.items():
        check_size(path(kind, key), value)
    return validated(kind, target, values)


def validated(kind: str, target: Target, values: Mapping[str, object]) -> dict[str, object]:
    """Check types and limits as `checked_values` does, and let numbers be as large as they are."""
    if not values:
        return {}
    adapter = _adapter(target)
    from pydantic_core import ValidationError

    try:
        return dict(adapter.validate_python({**values}, context=kind))
    except ValidationError as error:
        refusal = _refusal(kind, target, values, error)
    raise refusal


@functools.cache
def _adapter(target: Target) -> TypeAdapter[dict[str, object]]:
    """Build what checks keys for a call; pydantic is imported where the first is built."""
    from typing import NotRequired

    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import TypedDict

    types_ = {p.name: hints(target).get(p.name, object) for p in parameters(target)}
    keys = {name: NotRequired[kind if _is_known(kind) else object] for name, kind in types_.items()}
    schema = TypedDict("schema", keys)  # type: ignore[misc]
    schema.__pydantic_config__ = ConfigDict(  # type: ignore[attr-defined]
        strict=True,
        arbitrary_types_allowed=True,
        extra="allow" if takes_any(target) else "forbid",
    )
    return TypeAdapter(schema)


def parameters(target: Target) -> list[inspect.Parameter]:
    """List the named parameters of a call; empty for a builtin function without a signature."""
    kinds = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    return [p for p in _signature(target) if p.kind not in kinds]


def takes_any(target: Target) -> bool:
    """Check whether a call takes keys of any name."""
    return any(p.kind is p.VAR_KEYWORD for p in _signature(target))


def _signature(target: Target) -> list[inspect.Parameter]:
    try:
        return [*inspect.signature(target).parameters.values()]
    except ValueError:
        return [inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)]


@functools.cache
def hints(target: Target) -> dict[str, object]:
    """Read the types of a class or a function, with their limits, if they can be read.

    Somebody may have imported some for mypy alone.
    """
    if inspect.isclass(target) and not is_dataclass(target):
        target = target.__init__
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


def parts_of_type(hint: object) -> Iterator[object]:
    """List a type, the types that it is made of, and the marks beside them."""
    yield hint
    for part in typing.get_args(hint):
        yield from parts_of_type(part)


def nested_rows(hint: object) -> Mapping[str, Target]:
    """Return the rows of a nested group that a type allows; empty for other types."""
    kinds = (
        part for part in parts_of_type(hint) if isinstance(part, type) and issubclass(part, Chosen)
    )
    return next((kind.rows() for kind in kinds), {})


def _is_known(hint: object) -> bool:
    """Check whether values of a config can be checked against a type."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in {typing.Union, types.UnionType}:
        return all(map(_is_known, parts))
    if origin is typing.Annotated:
        return _is_known(parts[0])
    return (origin or hint) in KNOWN or bool(nested_rows(hint))


# ---- Error messages ------------------------------------------------------------------------------

BEYOND = {"limit", "literal_error", "greater_than", "greater_than_equal"} | {
    "less_than",
    "less_than_equal",
}


def _refusal(
    kind: str, target: Target, values: Mapping[str, object], error: ValidationError
) -> ConfigError:
    """Translate pydantic's error for the first refused key, in order of the keys."""
    order = [*map(str, values)]
    told = sorted(error.errors(include_url=False), key=lambda one: order.index(str(one["loc"][0])))
    name = str(told[0]["loc"][0])
    key, value = path(kind, name), [*values.values()][order.index(name)]
    if told[0]["type"] in {"extra_forbidden", "invalid_key"}:
        known = [path(kind, p.name) for p in parameters(target)]
        return UnreadKeysError(str(renamed(key) or unknown("key", key, known)), [key])
    schema = json_schema(hints(target)[name])
    beyond = next((e for e in told if e["loc"][0] == name and e["type"] in BEYOND), None)
    if beyond is not None:
        key = schema.get("key", key)
        places = [
            p for p in beyond["loc"] if isinstance(p, int) and isinstance(value, list | tuple)
        ]
        for place in places:
            of_list = next(s for s in (schema, *schema.get("anyOf", ())) if "items" in s)
            key, value, schema = f"{key}[{place}]", value[place], of_list["items"]  # type: ignore[index]
        if isinstance(value, str) and (choices := _choices(schema)):
            return unknown(key, value, choices)
    limits = beyond is not None and beyond["type"] != "literal_error"
    said = f"{key}={value!r}: expected {expected_values(schema, limits=limits).rstrip(',')}"
    return ConfigError(said + _quoted(key, value, schema))


def _missing(kind: str, target: Target, names: Sequence[str]) -> ConfigError:
    """List the missing keys, and the values that they need."""
    shown = {k: expected_values(json_schema(hints(target).get(k, object))) for k in names}
    lines = [f"{path(kind, k)} is missing: expected {text}" for k, text in shown.items()]
    if not of_project(target):  # a key that no page lists, whose type is not described
        of = f"{kind_text(target)} ({place_of(target)})"
        lines = [
            f"{path(kind, k)} is missing: {of} has no value for its parameter {k}; give it one"
            for k in names
        ]
    return MissingKeysError("\n  ".join(lines), [path(kind, k) for k in names])


def json_schema(hint: object) -> Schema:
    """Describe a type, with its limits, as JSON Schema; classes by their name as ``title``."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Named(GenerateJsonSchema):  # type: ignore[misc]
        def handle_invalid_for_json_schema(self, schema: typing.Any, error_info: str) -> Schema:
            return {"title": getattr(schema.get("cls"), "__name__", error_info)}

    strict = ConfigDict(arbitrary_types_allowed=True)
    found: Schema = TypeAdapter(hint, config=strict).json_schema(schema_generator=Named)
    return found


def expected_values(schema: Schema, *, limits: bool = False) -> str:
    """Describe the values of a type in the terms of a config file, by its JSON Schema.

    Args:
        schema: The type.
        limits: Whether to describe its limits, instead of the kind of number.
    """
    if limits and "description" in schema:
        return str(schema["description"])
    if options := schema.get("anyOf"):
        said = [expected_values(one, limits=limits) for one in options if one != {"type": "null"}]
        null = (", or null," if limits else " or null") if {"type": "null"} in options else ""
        return " or ".join(dict.fromkeys(said)) + null
    if choices := _choices(schema):
        return f"one of {', '.join(choices)}"
    kind = schema.get("type")
    if kind == "array":
        return f"a list of {expected_values(schema.get('items', {}), limits=limits)}, in brackets,"
    if kind == "object":
        return "a mapping"
    bounds = _bounds(schema) if limits else ""
    return bounds or WORDS.get(str(kind), str(schema.get("title", "object")))


def _choices(schema: Schema) -> list[str]:
    """List the allowed texts of a type; empty if it has no such list."""
    own = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    return [*own, *(word for one in schema.get("anyOf", ()) for word in _choices(one))]


def _bounds(schema: Schema) -> str:
    """Describe the bounds of a number; empty if it has none."""
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    low, high = (least if above is None else above), (most if below is None else below)
    if low is None:
        return ""
    if schema["type"] == "integer":
        return f"{low} or more" if high is None else f"{low} to {high}"
    if high in {None, math.inf}:
        return "a positive finite number" if above == 0 else f"a finite number from {low:g} on"
    left, right = "[" if above is None else "(", "]" if below is None else ")"
    return f"a number in {left}{low:g}, {high:g}{right}"


def _quoted(key: str, value: object, schema: Schema) -> str:
    """Describe how to write a number as text, if only a text is allowed."""
    kinds = {one.get("type") for one in (schema, *schema.get("anyOf", ()))}
    number = isinstance(value, int | float) and not {"integer", "number"} & kinds
    quotes = number and "string" in kinds and not _choices(schema)
    return f": quote it, '{key}=\"{value}\"'" if quotes else ""


def check_size(key: str, value: object) -> None:
    """Reject numbers that no tensor can hold: they would overflow at their first use.

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
            f"{key}={value}: it is used as a float32 number, which is 0 or lies between "
            f"{SMALLEST_FLOAT:.2g} and {LARGEST_FLOAT:.2g}"
        )


def _short(value: int) -> str:
    """Shorten an integer of any length for a message: Python writes at most 4300 digits."""
    return str(value) if abs(value) < 10**40 else f"a number of {value.bit_length()} bits"


def of_project(target: object) -> bool:
    """Check whether a class or function is of this project."""
    return str(getattr(target, "__module__", "")).startswith("fedraclora.")


def place_of(kind: typing.Any) -> str:
    """Return the qualified name of a class or a function: ``module.name``."""
    return f"{kind.__module__}.{getattr(kind, '__qualname__', kind)}"


def kind_text(found: object) -> str:
    """Describe the kind of an object, for messages."""
    if isinstance(found, type):
        return f"the class {found.__qualname__}"
    return "a function" if inspect.isroutine(found) else f"of type {type(found).__qualname__}"
