"""Signatures as the schema of the config: names, keys and types are held against them.

So it is with what a user brings: `object_of` gives the object that a value stands for.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass

from fedraclora.errors import ConfigError, DataError, MissingKeysError, UnreadKeysError, unknown
from fedraclora.imports import told_as
from fedraclora.limits import check_size, hints
from fedraclora.objects import is_named, named_object
from fedraclora.renamed import renamed
from fedraclora.trust import is_function

Plain = Mapping[str, object]  # a config, or a part of it, as nested values
PlainDict = dict[str, object]  # one that may be written into
# Groups whose choice may be an object of the user's.
OWN_GROUPS = ("method", "local", "partition", "aggregator", "server_optimiser", "attack")
KNOWN = (bool, int, float, str, list, dict, Mapping, Sequence, object, type(None))
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
        **given: Arguments that the config does not set; they win over nothing in the group.

    Returns:
        The call, ready to be made.

    Raises:
        ConfigError: For an unknown name or key, or a value of the wrong type.
    """
    row = row_of(kind, table, group.get("name"))
    return _bound(kind, row, without(group, "name"), given)


def row_of(kind: str, table: Mapping[str, T], name: object) -> T:
    """Look a name up in a table; one that stands for an object of the user's is a row, too.

    Raises:
        ConfigError: With the names that exist; a name that is no text is none of them.
    """
    if is_named(name) and kind in OWN_GROUPS:
        return typing.cast(T, _own_row(kind, table, name))
    if not isinstance(name, str) or name not in table:
        raise unknown(kind, name, table)
    return table[name]


def _own_row(kind: str, table: Mapping[str, object], name: object) -> Callable[..., object]:
    """Take an object of the user's as a row: a function, or what is of the class of the others."""
    found = named_object(kind, name)
    lineages = [getattr(row, "__mro__", (object,)) for row in table.values()]
    base = next(each for each in lineages[0] if all(each in lineage for lineage in lineages))
    if _divides(found) if base is object else inspect.isclass(found) and base in found.__mro__:
        return typing.cast("Callable[..., object]", found)
    if base is not object and base in type(found).__mro__:
        return lambda: found
    wanted = "a function" if base is object else f"a class derived from {_place(base)}"
    raise ConfigError(f"{kind} is {name}, which is {_shape(found)}; {wanted} is wanted")


def _divides(found: object) -> bool:
    """Check for a function, or a class of what is like the partitioners of flwr-datasets."""
    return callable(found) and (not inspect.isclass(found) or hasattr(found, "load_partition"))


def _place(kind: typing.Any) -> str:
    return f"{kind.__module__}.{getattr(kind, '__qualname__', kind)}"


def _shape(found: object) -> str:
    if isinstance(found, type):
        return f"the class {found.__qualname__}"
    return "a function" if inspect.isroutine(found) else f"of type {type(found).__qualname__}"


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

    Nothing is called whose kind is another than the one wanted.

    Args:
        key: Of the config, for messages.
        value: ``module:name``, or what `fedraclora.objects.lend` gave; or a mapping with that as
            its ``name``, whose other keys are parameters, by name. Or the object itself.
        kind: The class of what is wanted: an instance of it stands for itself, a class or a
            function is called with the parameters. None: what can be called is wanted: a class is
            called with the parameters, a function gets them beside those that it is called with.
        parameters: Those of a key of their own.
        at: That key; empty: there is none.
        called: Whether a callable is accepted as well as an instance of ``kind``.

    Raises:
        ConfigError: If it is not here, is something else, or does not take the parameters.
    """
    group = value if isinstance(value, Mapping) else {"name": value}
    name, own = group.get("name"), {**without(group, "name"), **parameters}
    found = named_object(key, name) if isinstance(name, str | None) else name
    if inspect.isclass(found) and not own and not is_function(str(name)):
        raise ConfigError(f"{key} is the class {found.__name__}: make one, {found.__name__}(...)")
    called = called or kind is None
    if _makes(found, kind, called=called):
        make = _bound(at or key, typing.cast("Callable[..., object]", found), own)
        with told_as(ConfigError, f"{key} is {name}, and ", "making it"):
            found = make()
    elif own and inspect.isroutine(found) and called:
        found = _bound(at or key, found, own, whole=False)
    elif own and not inspect.isclass(found):
        raise ConfigError(
            f"{key} is {name} with {', '.join(map(str, own))}, but it is {_shape(found)}, which is "
            "made already and takes none"
        )
    fits = (called and callable(found)) or (kind is not None and isinstance(found, kind))
    if fits and not inspect.isclass(found):
        return found
    wanted = " or ".join(["a function"] * called + ([f"one of {_place(kind)}"] if kind else []))
    raise ConfigError(f"{key} is {name}, which is {_shape(found)}; {wanted} is wanted")


def _makes(found: typing.Any, kind: type | None, *, called: bool) -> bool:
    """Check by its class or return annotation whether a callable returns the wanted kind.

    Args:
        found: A class, a function or an object.
        kind: As for `object_of`.
        called: Whether what can be called is wanted.
    """
    if inspect.isclass(found):
        calls = any("__call__" in vars(each) for each in found.__mro__)
        return (called and calls) or (kind is not None and issubclass(found, kind))
    if called or not inspect.isroutine(found):
        return False
    given = _hints(found).get("return", kind)  # a function of the user's need not say it
    return (
        kind is None
        or not inspect.isclass(given)
        or issubclass(given, kind)
        or issubclass(kind, given)
    )


def call_function(
    key: str, name: str, *arguments: object, parameters: Plain | None = None, at: str = ""
) -> typing.Any:
    """Call what a config names; what it raises is told with its place.

    Args:
        key: Of the config that names it, for messages.
        name: ``package.module:function``.
        *arguments: Those that it is called with.
        parameters: Those of the config, by name.
        at: By which key these are said.

    Raises:
        ConfigError: As `object_of`.
        DataError: If the call fails.
    """
    function = object_of(key, name, parameters=parameters or {}, at=at)
    given = [*map(repr, arguments), *(f"{k}={v!r}" for k, v in (parameters or {}).items())]
    with told_as(DataError, f"{key}={name}: ", f"calling it with ({', '.join(given)})"):
        return function(*arguments)


def _bound(
    kind: str, target: Callable[..., T], group: Plain, given: Plain = EMPTY, *, whole: bool = True
) -> Callable[..., T]:
    """Bind the keys of a group as arguments of ``target``, each checked against its type.

    Args:
        kind: The group's key, for messages.
        target: What is to be called.
        group: The group, without its ``name``.
        given: Arguments that the config does not set; a key of the group wins over them.
        whole: Whether the call needs no further arguments.

    Returns:
        The call, ready to be made.

    Raises:
        UnreadKeysError: For a key that ``target`` does not take.
        MissingKeysError: Naming all keys that have no default and are missing.
        ConfigError: For a value of the wrong type.
    """
    every, kinds = _parameters(target), _hints(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in every)
    parameters = {p.name: p for p in every if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}}
    arguments = {key: value for key, value in given.items() if takes_any or key in parameters}
    for key, value in group.items():
        if key not in parameters and not takes_any:
            path, known = f"{kind}.{key}", [f"{kind}.{p}" for p in parameters]
            error = renamed(path) or unknown("key", path, known)
            raise UnreadKeysError(str(error), [path])
        arguments[key] = coerce(f"{kind}.{key}", value, kinds.get(key, object))
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in arguments]
    if missing and whole:
        wanted = {f"{kind}.{k}": _shown(kinds.get(k, object)) for k in missing}
        lines = [f"{key} is missing; {shown} is wanted" for key, shown in wanted.items()]
        if not of_project(target):  # a key that no page lists, with a type that may not be said
            of = f"{_shape(target)} ({_place(target)})"
            lines = [
                f"{kind}.{k} is missing: {of} has no value for its parameter {k}; give it one"
                for k in missing
            ]
        raise MissingKeysError("\n  ".join(lines), wanted)
    return functools.partial(target, **arguments)


def _parameters(target: Callable[..., object]) -> list[inspect.Parameter]:
    """List the parameters of a call; of some functions of C nobody knows them: any will do."""
    try:
        return [*inspect.signature(target).parameters.values()]
    except ValueError:
        return [inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)]


def _hints(target: Callable[..., object]) -> Mapping[str, object]:
    """Read the types of a call, as far as they are said in a way that can be read."""
    plain = inspect.isclass(target) and not is_dataclass(target)
    found = hints(target.__init__ if plain else target)
    if of_project(target):
        return found
    return {key: hint for key, hint in found.items() if all(map(_is_known, _options(hint)))}


def of_project(target: object) -> bool:
    """Check whether a class or function is of this project."""
    return str(getattr(target, "__module__", "")).startswith("fedraclora.")


def _is_known(option: object) -> bool:
    """Check whether values of a config can be held against a type, which somebody has written."""
    return (typing.get_origin(option) or option) in KNOWN or bool(nested_rows(option))


def build(kind: str, target: Callable[..., T], group: Plain) -> T:
    """Call ``target`` with the keys of a group, checked.

    Raises:
        ConfigError: For an unknown or missing key, or a value of the wrong type.
    """
    return _bound(kind, target, group)()


def coerce(key: str, value: object, hint: object) -> object:
    """Check a plain value against a type hint; an int may stand for a float.

    Limits beside the type are not checked here (`fedraclora.limits`), but the words that one leaves
    are named where the type is wrong.

    A class whose ``rows()`` is a table stands for a nested group: its ``name`` is a row of the
    table, its other keys are that row's arguments, and what the row makes is the value. A row does
    not know where it is nested: what it refuses starts with its own key and gets the whole path.

    Raises:
        ConfigError: Naming the key, the value and the wanted type.

    Example:
        >>> coerce("local.lr", 1, float)
        1.0
        >>> coerce("method.rank", "four", int)
        Traceback (most recent call last):
        ...
        fedraclora.errors.ConfigError: method.rank is 'four'; int is wanted
    """
    check_size(key, value)
    options = _options(hint)
    for option in options:
        if (table := nested_rows(option)) and isinstance(value, Mapping):
            row = bind(key, table, value)
            try:
                return row()
            except ConfigError as error:
                raise ConfigError(f"{key}.{error}") from error
        origin = typing.get_origin(option) or option
        if option is object or (value is None and option is type(None)):
            return value
        if isinstance(origin, type) and isinstance(value, origin):
            if isinstance(value, bool) and origin is not bool:
                continue
            if isinstance(value, str) and origin is not str:
                continue  # a text is a sequence of letters, but never a list
            if isinstance(value, list | Mapping) and not _fits_elements(value, option):
                continue
            return value
    if float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted, quoted = _shown(hint), ""
    if {str, int, float} & {*options} == {str} and isinstance(value, int | float):
        quoted = "" if "one of" in wanted else f": quote it, '{key}=\"{value}\"'"
    raise ConfigError(f"{key} is {value!r}; {wanted} is wanted{quoted}")


def nested_rows(hint: object) -> Mapping[str, Callable[..., object]]:
    """The rows of a class that stands for a nested group, or may; empty for other hints."""
    tables = (getattr(option, "rows", None) for option in _options(hint))
    return next((rows() for rows in tables if callable(rows)), {})


def _shown(hint: object) -> str:
    """A hint in the words of a config file."""
    if _is_union(hint):
        return " or ".join(map(_shown, typing.get_args(hint)))
    if annotated := _annotated(hint):
        words = [word for limit in annotated[1:] for word in getattr(limit, "choices", ())]
        return f"one of {', '.join(words)}" if words else _shown(annotated[0])
    if table := nested_rows(hint):
        return f"a group with a name ({', '.join(table)})"
    if hint is type(None):
        return "null"
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in {Mapping, Sequence, list}:
        listed = f"a list of {' or '.join(map(_shown, parts))}, in brackets,"
        return "a mapping" if origin is Mapping else listed
    return str(hint) if parts else getattr(hint, "__name__", str(hint))


def _fits_elements(value: list[object] | Mapping[str, object], hint: object) -> bool:
    """Check the elements of a list, or the values of a mapping, against those of its hint."""
    for element in value.values() if isinstance(value, Mapping) else value:
        for inner in typing.get_args(hint)[-1:]:
            try:
                coerce("", element, inner)
            except ConfigError:
                return False
    return True


def _options(hint: object) -> tuple[object, ...]:
    """The types that a hint allows, without the limits beside them."""
    if _is_union(hint):
        return tuple(option for inner in typing.get_args(hint) for option in _options(inner))
    annotated = _annotated(hint)
    return _options(annotated[0]) if annotated else (hint,)


def _annotated(hint: object) -> tuple[typing.Any, ...]:
    """What stands in ``Annotated[...]``; empty for other hints."""
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else ()


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in {typing.Union, types.UnionType}
