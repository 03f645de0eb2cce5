"""Register a user's objects: from a module that a config names, or from a Python program.

A config is plain text, and a module, an array or a function is not. In its place stands
``module:name``, which any process imports; or the name under which the program has registered the
object in this process (`register_object`), with a digest: the same object gives the same config,
hence the same run, and a resumed run needs the same object again. `fedraclora.binding.object_of`
returns the object.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Set
from functools import cached_property, partial
from importlib.util import resolve_name
from inspect import getattr_static
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedraclora.errors import ConfigError
from fedraclora.imports import import_object
from fedraclora.tree import digest as digest_of
from fedraclora.trust import is_function
from fedraclora.used_names import (
    file_of,
    imports_of,
    is_state,
    names_of,
    statements_of,
    text_of,
    used_in,
)

NAME = "object"  # what a group is called that stands for one
REGISTERED = re.compile(r"[\w.<>]+@[0-9a-f]{16}")
PLAIN = (str, bytes, int, float, complex, type(None), type(...))
_REGISTERED: dict[str, Any] = {}


def register_object(thing: Any, digest: str | None = None) -> str:
    """Register an object under its digest, or under a name with its digest.

    Args:
        thing: The object.
        digest: Its digest, if a group of the config has one beside its name; None: `object_digest`.

    Returns:
        The name for the config.
    """
    inner = thing
    while isinstance(inner, partial):
        inner = inner.func
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    name = digest or f"{named.__qualname__}@{object_digest(thing)}"
    _REGISTERED[name] = thing
    return name


def registered_object(group: str, digest: object) -> Any:
    """Return the object with a digest.

    Args:
        group: Of the config, for the message: ``model``, ``data`` or ``method``.
        digest: What the config says.

    Raises:
        ConfigError: If this process has no such object.
    """
    if digest in _REGISTERED:
        return _REGISTERED[str(digest)]
    raise ConfigError(
        f"this run has an object of a Python program as its {group}, of digest {digest}, which "
        f"this process does not have: call fedraclora.simulate({group.rpartition('.')[2]}=...) "
        "with the same object, and folder=..., resume=True to go on"
    )


def is_named(value: object) -> bool:
    """Check whether a config value names an object, importable or registered."""
    return isinstance(value, str) and (is_function(value) or bool(REGISTERED.fullmatch(value)))


def named_object(key: str, name: object) -> Any:
    """Return the object that a config value names.

    Args:
        key: Of the config, for messages.
        name: ``module:name``, or what `register_object` gave.

    Raises:
        ConfigError: If it is neither, cannot be imported, or is not here.
    """
    if isinstance(name, str) and REGISTERED.fullmatch(name):
        return registered_object(key, name)
    return import_object(key, str(name))


def words_in(config: object) -> Iterator[str]:
    """List the strings of a config, in the order of its keys."""
    if isinstance(config, str):
        yield config
    elif isinstance(config, Mapping | list | tuple):
        for value in config.values() if isinstance(config, Mapping) else config:
            yield from words_in(value)


def named_by(config: Mapping[str, object]) -> dict[str, Any]:
    """Find the registered objects that a config names."""
    return {word: _REGISTERED[word] for word in words_in(config) if word in _REGISTERED}


def code_digests(config: Mapping[str, object]) -> dict[str, str]:
    """Hash the code that a config names, if its name does not identify it.

    That is ``module:name``, as far as it was imported, and what was registered under a digest of
    its own.
    """
    registered = [
        type(thing) for word, thing in named_by(config).items() if not REGISTERED.fullmatch(word)
    ]
    found = {kind.__qualname__: object_digest(kind) for kind in registered}
    for word in filter(is_function, words_in(config)):
        module, _, name = word.partition(":")
        if (thing := getattr(sys.modules.get(module), name, None)) is not None:
            found[word] = object_digest(thing)
    return found


def object_digest(thing: object) -> str:
    """Hash an object's name, code and attributes; the same in any process.

    Functions and classes count with their code, and with what this names in modules of the user's:
    functions, classes, constants (names in capitals) and plain values by what they are, objects,
    lists and dicts by the statements that make them. What is of installed packages counts by name.
    Attributes that begin with an underscore are left out.
    """
    root = (getattr(thing, "__module__", None) or type(thing).__module__).partition(".")[0]
    return hashlib.sha256(_told(thing, root, set(), ()).encode()).hexdigest()[:16]


def attribute_digests(thing: object) -> dict[str, str]:
    """List the digests of an object's attributes, without caches and ``_containers``."""
    root = type(thing).__module__.partition(".")[0]
    kept = {k: v for k, v in getattr(thing, "__dict__", {}).items() if not _is_cached(thing, k)}
    seen = {k: v for k, v in kept.items() if not k.startswith("_") or isinstance(v, PLAIN)}
    return {name: _told(value, root, set(), ()) for name, value in seen.items()}


def refuse_changed(key: str, thing: object, before: Mapping[str, str]) -> None:
    """Refuse an object whose attributes have changed (`attribute_digests`).

    Raises:
        ConfigError: Naming the attribute.
    """
    now = attribute_digests(thing)
    if names := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
        raise ConfigError(
            f"{key}: {type(thing).__name__} has changed its attribute {names[0]!r} in the run. "
            "Other processes, and a run that goes on, begin with the object as it was made: let it "
            "compute from its arguments alone"
        )


# Kinds of objects, and simpler values that represent them.
SIMPLER: tuple[tuple[Any, Callable[[Any], object]], ...] = (
    (torch.Tensor, lambda it: digest_of({"": it})),
    (np.ndarray, lambda it: (str(it.dtype), it.shape, hashlib.sha256(it.tobytes()).hexdigest())),
    (torch.nn.Module, lambda it: (type(it), repr(it), dict(it.state_dict()), _settings(it))),
    (types.ModuleType, lambda it: it.__name__),  # not its whole content
    (types.CodeType, lambda it: (it.co_code, it.co_names, it.co_consts)),
    (types.MethodType, lambda it: (it.__func__, it.__self__)),
    (partial, lambda it: (it.func, it.args, it.keywords)),
    (property, lambda it: (it.fget, it.fset)),
    (cached_property, lambda it: it.func),
    ((staticmethod, classmethod), lambda it: it.__func__),
)


def _told(thing: Any, root: str, known: set[str], above: tuple[int, ...]) -> str:
    """Write a description of an object, for its digest.

    Args:
        thing: The object.
        root: The package whose code counts even if it is installed.
        known: Names of the functions and classes that were written. Modified.
        above: Identities of the objects that hold this one.
    """
    if isinstance(thing, PLAIN):
        return repr(thing)
    if id(thing) in above:
        return "itself"
    told = partial(_told, root=root, known=known, above=(*above, id(thing)))
    simpler = next((make for kinds, make in SIMPLER if isinstance(thing, kinds)), None)
    if simpler is not None:
        return told(simpler(thing))
    if isinstance(thing, Mapping):
        parts = sorted(f"{told(key)}: {told(value)}" for key, value in thing.items())
    elif isinstance(thing, list | tuple | Set):
        parts = [*map(told, thing)]
        parts = sorted(parts) if isinstance(thing, Set) else parts
    elif hasattr(thing, "__qualname__"):
        name, counts = thing.__qualname__, _counts(str(thing.__module__), root)
        parts, place = [name], f"{thing.__module__}:{name}"
        if counts and place not in known:
            known.add(place)
            parts += map(told, _parts(thing, partial(_counts, root=root), known))
    else:
        own, cached = getattr(thing, "__dict__", {}), partial(_is_cached, thing)
        kept = {k: v for k, v in own.items() if not (k.startswith("_") or cached(k))}
        parts = [told(type(thing)), told(kept)]
        if not kept and " at 0x" not in (text := repr(thing)):
            parts.append(text)
    return f"{type(thing).__name__}({', '.join(parts)})"


def _settings(module: torch.nn.Module) -> dict[str, object]:
    """List a module's attributes beside its weights, which its repr may omit (gamma, margin)."""
    own = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}
    listed = {k: v if isinstance(v, list | tuple) else [v] for k, v in own.items()}
    return {k: v for k, v in listed.items() if all(isinstance(each, PLAIN) for each in v)}


def _is_cached(thing: object, name: str) -> bool:
    return isinstance(getattr_static(type(thing), name, None), cached_property)


LIBRARY = Path(ast.__file__).parent  # Python's own modules
KNOWN = {"fedraclora", "torch", "torchmetrics"}  # a name and its settings are enough for these


def _counts(module: str, root: str) -> bool:
    """Check whether a module's code counts: not Python's, this project's, or a package's.

    The package that the object itself is of counts, installed or not.
    """
    first = module.partition(".")[0]
    if first in sys.stdlib_module_names - {"__main__"} or first in KNOWN:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return first == root or "site-packages" not in file


Counting = Callable[[str], bool]


def _parts(thing: Any, counts: Counting, known: set[str]) -> Iterator[object]:
    """List the parts of a function or a class.

    Args:
        thing: The function or class.
        counts: Whether the code of a module does, by its name.
        known: Names that were listed. Modified.
    """
    module = sys.modules.get(str(thing.__module__))
    if isinstance(thing, type):
        yield from thing.__bases__
        for name, value in sorted(vars(thing).items()):
            made = getattr(getattr(value, "__code__", None), "co_filename", "") == "<string>"
            kinds = (*PLAIN, types.FunctionType, property, cached_property, staticmethod)
            if isinstance(value, (*kinds, classmethod)) and not made and name not in UNTOLD:
                yield name, value
        if module is not None:
            yield from _stated(module, "", counts, known, scope=thing.__qualname__)
        return
    levels = [thing]
    while (inner := getattr(levels[-1], "__wrapped__", None)) is not None:
        levels.append(inner)
    for function in levels:
        if (code := getattr(function, "__code__", None)) is None or _is_library(code.co_filename):
            continue  # a function in C, or a library's decorator
        yield code, function.__defaults__, function.__kwdefaults__
        yield [_content(cell) for cell in function.__closure__ or ()]
        for chain in sorted(names_of(code)):
            yield from _named(module, function.__globals__, chain, counts, known)
        for name in sorted(imports_of(code)):
            file = file_of(name)
            if file is not None and counts(name) and not _is_library(str(file)):
                yield name, text_of(file)


def _named(
    module: types.ModuleType | None,
    names: Mapping[str, Any],
    chain: tuple[str, ...],
    counts: Counting,
    known: set[str],
) -> Iterator[object]:
    """List the globals that code uses, and the names that it takes from a user's modules.

    Functions, classes, constants and plain values count by what they are, if no function of the
    module sets them; others by the statements that make them, since they may change in a run.
    """
    name, *rest = chain
    value = names.get(name)
    if isinstance(value, types.ModuleType):
        if rest and counts(value.__name__):
            yield from _named(value, vars(value), tuple(rest), counts, known)
    elif isinstance(value, types.FunctionType | type) or (name.isupper() and value is not None):
        yield name, value
    elif name in names and not name.startswith("__"):  # __file__ differs on other machines
        if not isinstance(value, (*PLAIN, tuple, frozenset)):
            yield name, type(value)
            yield from _stated(module, name, counts, known) if module is not None else ()
        elif module is None or not is_state(module, name):
            yield name, value


def _stated(
    module: types.ModuleType, name: str, counts: Counting, known: set[str], scope: str = ""
) -> Iterator[object]:
    """List the statements that set a name, and the names that they use; arguments as above."""
    if (place := f"{module.__name__}:{scope}={name}") in known or not counts(module.__name__):
        return
    known.add(place)
    nodes = statements_of(module, name, scope)
    yield from map(ast.dump, nodes)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):  # it is defined in the module that it is imported from
            of = resolve_name("." * node.level + (node.module or ""), module.__package__)
            first = {(each.asname or each.name): each.name for each in node.names}
            if (other := sys.modules.get(of)) is not None and name in first:
                yield from _named(other, vars(other), (first[name],), counts, known)
    for chain in used_in(nodes):
        yield from _named(module, vars(module), chain, counts, known)


def _is_library(file: str) -> bool:
    return "site-packages" in file or Path(file).is_relative_to(LIBRARY)


UNTOLD = {"__doc__", "__module__", "__qualname__", "__firstlineno__"}


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is still empty
        return None
