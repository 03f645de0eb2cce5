"""Check config groups against signatures, which define names, keys and types.

`object_of` returns the user's object that a value names.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping

from fedraclora.errors import ConfigError, DataError, unknown
from fedraclora.imports import as_user_error
from fedraclora.object_registry import is_named, named_object
from fedraclora.schema import bound, hints, kind_text, place_of
from fedraclora.trust import is_function

Plain = Mapping[str, object]  # a config, or a part of it, as nested values
PlainDict = dict[str, object]  # a mutable one
# Groups whose choice may be a user's object.
OWN_GROUPS = ("method", "local", "partition", "aggregator", "server_optimizer", "attack")
EMPTY: Plain = types.MappingProxyType({})


def without(group: Plain, *keys: str) -> dict[str, object]:
    """Copy a group without some keys."""
    return {k: v for k, v in group.items() if k not in keys}


def section(plain: Plain, key: str) -> dict[str, object]:
    """Return one group of the config as a dict.

    Raises:
        ConfigError: If it is missing or not a group.
    """
    value = plain.get(key)
    if not isinstance(value, Mapping):
        hint = "" if value is None else f": it has keys of its own (simulate {key} --help)"
        raise ConfigError(f"the config needs a section {key}, but has {key}={value!r}{hint}")
    return dict(value)


T = typing.TypeVar("T")


def bind(
    kind: str, table: Mapping[str, Callable[..., T]], group: Plain, **given: object
) -> Callable[[], T]:
    """Look a group's ``name`` up in a table and bind its other keys as arguments.

    Args:
        kind: The group's key, for messages.
        table: Callables by name.
        group: The group.
        **given: Arguments that the config does not set; keys of the group override them.

    Returns:
        The call, ready to be made.

    Raises:
        ConfigError: For an unknown name or key, or a value of the wrong type.
    """
    row = row_of(kind, table, group.get("name"))
    return bound(kind, row, without(group, "name"), given)


def row_of(kind: str, table: Mapping[str, T], name: object) -> T:
    """Return a table's row by name; the name of a user's object is a row, too.

    Raises:
        ConfigError: Naming the rows, if the name does not exist or is no text.
    """
    if is_named(name) and kind in OWN_GROUPS:
        return typing.cast(T, _own_row(kind, table, name))
    if not isinstance(name, str) or name not in table:
        raise unknown(kind, name, table)
    return table[name]


def _own_row(kind: str, table: Mapping[str, object], name: object) -> Callable[..., object]:
    """Return a user's object as a row: a function, or a class like the other rows."""
    found = named_object(kind, name)
    lineages = [getattr(row, "__mro__", (object,)) for row in table.values()]
    base = next(each for each in lineages[0] if all(each in lineage for lineage in lineages))
    if _divides(found) if base is object else inspect.isclass(found) and base in found.__mro__:
        return typing.cast("Callable[..., object]", found)
    if base is not object and base in type(found).__mro__:
        return lambda: found
    wanted = "a function" if base is object else f"a class derived from {place_of(base)}"
    raise ConfigError(f"{kind}={name} is {kind_text(found)}, expected {wanted}")


def _divides(found: object) -> bool:
    """Check for a function, or a class like the partitioners of flwr-datasets."""
    return callable(found) and (not inspect.isclass(found) or hasattr(found, "load_partition"))


def object_of(
    key: str,
    value: object,
    kind: type | None = None,
    *,
    parameters: Plain = EMPTY,
    at: str = "",
    called: bool = False,
) -> typing.Any:
    """Return the object that a value of the config stands for, with its parameters applied.

    An object of another kind is not called.

    Args:
        key: The key of the config, for messages.
        value: ``module:name``, or a name of `fedraclora.object_registry`; or a mapping with that
            as its ``name``, whose other keys are parameters. Or the object itself.
        kind: The wanted class: an instance is returned, a class or a function is called with the
            parameters. None: a callable is wanted: a class is called with the parameters, a
            function receives them beside its other arguments.
        parameters: Parameters from a key of their own.
        at: That key; empty: none.
        called: Whether a callable is accepted as well as an instance of ``kind``.

    Raises:
        ConfigError: If it does not exist, is of another kind, or does not accept the parameters.
    """
    group = value if isinstance(value, Mapping) else {"name": value}
    name, own = group.get("name"), {**without(group, "name"), **parameters}
    found = named_object(key, name) if isinstance(name, str | None) else name
    if inspect.isclass(found) and not own and not is_function(str(name)):
        raise ConfigError(
            f"{key} is the class {found.__name__}: give an instance, {found.__name__}(...)"
        )
    called = called or kind is None
    if _makes(found, kind, called=called):
        make = bound(at or key, typing.cast("Callable[..., object]", found), own)
        with as_user_error(ConfigError, f"{key} is {name}, and ", "making it"):
            found = make()
    elif own and inspect.isroutine(found) and called:
        found = bound(at or key, found, own, whole=False)
    elif own and not inspect.isclass(found):
        raise ConfigError(
            f"{key} is {name} with {', '.join(map(str, own))}, but it is {kind_text(found)}, which "
            "is made already and takes none"
        )
    fits = (called and callable(found)) or (kind is not None and isinstance(found, kind))
    if fits and not inspect.isclass(found):
        return found
    wanted = " or ".join(["a function"] * called + ([f"one of {place_of(kind)}"] if kind else []))
    raise ConfigError(f"{key}={name} is {kind_text(found)}, expected {wanted}")


def _makes(found: typing.Any, kind: type | None, *, called: bool) -> bool:
    """Check by its class or return annotation whether a callable returns the wanted kind.

    Args:
        found: A class, a function or an object.
        kind: As for `object_of`.
        called: Whether a callable is wanted.
    """
    if inspect.isclass(found):
        calls = any("__call__" in vars(each) for each in found.__mro__)
        return (called and calls) or (kind is not None and issubclass(found, kind))
    if called or not inspect.isroutine(found):
        return False
    given = hints(found).get("return", kind)  # a user's function need not have annotations
    return (
        kind is None
        or not inspect.isclass(given)
        or issubclass(given, kind)
        or issubclass(kind, given)
    )


def call_function(
    key: str, name: str, *arguments: object, parameters: Plain | None = None, at: str = ""
) -> typing.Any:
    """Call a function that the config names; an exception is reported with its place.

    Args:
        key: The key that names it, for messages.
        name: ``package.module:function``.
        *arguments: Its positional arguments.
        parameters: Its parameters from the config, by name.
        at: The key of these parameters.

    Raises:
        ConfigError: As `object_of`.
        DataError: If the call fails.
    """
    function = object_of(key, name, parameters=parameters or {}, at=at)
    given = [*map(repr, arguments), *(f"{k}={v!r}" for k, v in (parameters or {}).items())]
    with as_user_error(DataError, f"{key}={name}: ", f"calling it with ({', '.join(given)})"):
        return function(*arguments)


def build(kind: str, target: Callable[..., T], group: Plain) -> T:
    """Call ``target`` with the keys of a group, checked.

    Raises:
        ConfigError: For an unknown or missing key, or a value of the wrong type.
    """
    return bound(kind, target, group)()
