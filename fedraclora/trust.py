"""Check which code a config may name, before any of it is imported.

Each ``module:name`` has two checks. Where is it? The user's own modules are in the working folder
or in another folder of Python's path; a few installed packages are known (`PACKAGES`), and all
other installed code is refused unless its module is trusted. Who names it? Arguments of the user,
or of a program, are the user's; a file of others may only name trusted code.

Trusted are the modules of ``trust=``, with all below them. An environment variable holds them, so
that the processes that a run starts on this machine know them, too.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedraclora.errors import ConfigError

VARIABLE = "FEDRACLORA_TRUST"
# Installed classes that may be named, and their required base classes.
PACKAGES: Mapping[str, tuple[str, str]] = {
    "fedraclora": ("builtins", "object"),
    "torch.nn": ("torch.nn.modules.module", "Module"),
    "torchmetrics": ("torchmetrics.metric", "Metric"),
    "flwr_datasets.partitioner": ("flwr_datasets.partitioner.partitioner", "Partitioner"),
}
LOSSES = "torch.nn.functional"  # modules whose functions with a target may be named
INSTALLED = {"site-packages", "dist-packages"}
# Keys of a config that may name code: groups and leaves.
NAMING: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("method", "partition", "aggregator", "server_optimizer", "attack"), ("name",)),
    "local": ("name", "train", "extras"),
    "model": ("name", "function"),
    "data": ("name", "function", "samples", "test_function", "loss", "metrics"),
    "callbacks": ("",),
    "steps": ("",),
}
WORD = r"[^\W\d]\w*"
MODULE = re.compile(rf"{WORD}(\.{WORD})*(:{WORD})?")
NO_MODULES = {"hub", "package"}  # prefixes of other spellings

_SAID: list[str] | None = None


def is_function(name: str) -> bool:
    """Distinguish ``package.module:function`` from the path of a file or a folder."""
    module, mark, attribute = name.partition(":")
    return bool(mark) and bool(module) and "/" not in module and attribute.isidentifier()


# Who says it


def trusted() -> list[str]:
    """Return the trusted modules."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def trust(names: Iterable[str]) -> None:
    """Trust further modules, in this process and those that it starts.

    Args:
        names: Modules, each with its submodules; or a single ``module:name``.

    Raises:
        ConfigError: If one is no such name.
    """
    given = [names] if isinstance(names, str) else [*names]
    for name in given:
        if not isinstance(name, str) or not MODULE.fullmatch(name):
            raise ConfigError(f"trust has {name!r}: give the name of a module, package.module")
    if given:
        os.environ[VARIABLE] = ",".join(dict.fromkeys([*trusted(), *given]))


@contextmanager
def trusting(names: Iterable[str]) -> Iterator[None]:
    """Trust modules, as `trust` does, only inside this context."""
    before = os.environ.get(VARIABLE)
    trust(names)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def trusts(name: str) -> bool:
    """Return whether ``module:name``, its module or a parent package is trusted."""
    module = name.partition(":")[0]
    return any(each == name or _within(module, each) for each in trusted())


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@contextmanager
def restricted_imports(words: Iterable[str]) -> Iterator[None]:
    """Restrict imports inside to names in these texts, in those of `allow`, and trusted ones."""
    global _SAID  # noqa: PLW0603  of a command, whose process and threads it holds for
    before, _SAID = _SAID, [*words]
    try:
        yield
    finally:
        _SAID = before


def allow(text: str) -> None:
    """Add a user's text to those that `restricted_imports` accepts."""
    if _SAID is not None:
        _SAID.append(text)


def contains_name(name: str, texts: Iterable[str]) -> bool:
    """Check whether one of some texts contains a name as a whole, not as a part of a path."""
    whole = re.compile(rf"(?<![\w./]){re.escape(name)}(?![\w/])")
    return any(whole.search(text) for text in texts)


def names_in(config: Mapping[str, object]) -> dict[str, str]:
    """List the code that a config names, by key; without parameters.

    Example:
        >>> names_in({"data": {"loss": {"name": "mine:f", "a": 1}}, "model": {"path": "hub:x"}})
        {'data.loss.name': 'mine:f'}
    """
    found: dict[str, str] = {}
    for group, leaves in NAMING.items():
        for leaf in leaves:
            value = config.get(group)
            if leaf:
                value = value.get(leaf) if isinstance(value, Mapping) else None
            found |= _named(f"{group}.{leaf}".rstrip("."), value)
    return found


def every_name(key: str, value: object) -> dict[str, str]:
    """List all strings in nested values that look like names of code, by key."""
    if isinstance(value, Mapping):
        pairs = [(f"{key}.{inner}".lstrip("."), each) for inner, each in value.items()]
        return {k: v for at, each in pairs for k, v in every_name(at, each).items()}
    if isinstance(value, list):
        pairs = [(f"{key}[{place}]", each) for place, each in enumerate(value)]
        return {k: v for at, each in pairs for k, v in every_name(at, each).items()}
    return _named(key, value)


def _named(key: str, value: object) -> dict[str, str]:
    if isinstance(value, Mapping):
        return _named(f"{key}.name", value.get("name"))
    if isinstance(value, list):
        pairs = [_named(f"{key}[{place}]", each) for place, each in enumerate(value)]
        return {k: v for pair in pairs for k, v in pair.items()}
    # Parameters may follow a name, and the path of a group may precede it.
    name = str(value).partition(" ")[0].rpartition("/")[2] if isinstance(value, str) else ""
    named = is_function(name) and name.partition(":")[0] not in NO_MODULES
    return {key: name} if named else {}


def refuse_unsaid(where: object, names: Mapping[str, str], own: Iterable[str] = ()) -> None:
    """Reject code named in a file, unless the user trusts or names it.

    Args:
        where: The file, for the message.
        names: The names in it, by key.
        own: Names that the user gives elsewhere.

    Raises:
        ConfigError: Listing all of them, and how to trust them. None of them was imported.
    """
    known = {*own}
    strange = {
        key: name
        for key, name in names.items()
        if not (name in known or trusts(name) or contains_name(name, _SAID or ()))
    }
    if not strange:
        return
    listed = ", ".join(f"{key}={name}" for key, name in strange.items())
    raise ConfigError(
        f"{where} names code that would be run: {listed}. If you trust that code, which may be "
        f"by others, add {trust_word(strange.values())} (in Python trust=[...])."
    )


def trust_word(names: Iterable[str]) -> str:
    """Return the command word that trusts the modules of some names; empty: there are none.

    Example:
        >>> trust_word(["mine:net", "mine:loss", "yours.data:rows"])
        'trust=mine,yours.data'
    """
    modules = dict.fromkeys(name.partition(":")[0] for name in names)
    return f"trust={','.join(modules)}" if modules else ""


# The place of a module


def refuse_place(key: str, name: str) -> None:
    """Reject ``module:name`` by the location of its module, without importing it.

    Raises:
        ConfigError: If the user did not name it, or its module is neither the user's nor of
            `PACKAGES`.
        ModuleNotFoundError: If there is no such module.
    """
    module = name.partition(":")[0]
    if trusts(name):
        return
    if _SAID is not None and not contains_name(name, _SAID):
        refuse_unsaid("a file", {key: name})
    if any(_within(module, package) for package in PACKAGES):
        return
    if why := foreign(module):
        raise ConfigError(f"{key}={name!r}: {_refusal(module, why)}")


def refuse_found(key: str, name: str, found: object) -> None:
    """Reject a module's object that belongs to another package, or must not be named.

    Raises:
        ConfigError: If it is a module, belongs to a module that `refuse_place` rejects, or to one
            of `PACKAGES` without being of an allowed class.
    """
    module = name.partition(":")[0]
    if name in trusted():
        return
    if isinstance(found, types.ModuleType):
        raise ConfigError(f"{key}={name!r} is a module: name a function or a class in it")
    defined = hasattr(found, "__qualname__")
    home = getattr(found if defined else type(found), "__module__", None)
    of_package = any(_within(str(home), package) for package in PACKAGES)
    if not defined:  # an object, which the module has made
        inside = any(_within(module, package) for package in PACKAGES) and not trusts(name)
        strange = callable(found) and not isinstance(found, functools.partial)
        if inside or (strange and _is_python(str(home))):
            raise ConfigError(
                f"{key}={name!r} is not a class: name a class, or a function of your own"
            )
        return
    if not isinstance(home, str):
        why = "no module defines it"
    elif trusts(home) or (of_package and _is_known(found, home)):
        return
    elif of_package:
        why = "only modules, metrics, partitioners and losses of installed packages are allowed"
    elif not (why := foreign(home) or ""):
        return
    raise ConfigError(
        f"{key} is {name!r}, which is {home}:{getattr(found, '__qualname__', '')}, and "
        f"{_refusal(str(home), why)}"
    )


def _refusal(module: str, why: str) -> str:
    return (
        f"code of {module} is not run ({why}). Name a function of your own, in the working "
        f"folder, that calls it, or add {trust_word([module])} (in Python trust=[...])"
    )


def _is_known(found: Any, home: str) -> bool:
    """Check whether an object of `PACKAGES` is a class of an allowed kind, or a loss."""
    if not inspect.isclass(found):
        if home != LOSSES or not inspect.isfunction(found):
            return False
        return "target" in inspect.signature(found).parameters
    bases = [(each.__module__, each.__name__) for each in found.__mro__]
    return any(_within(home, package) and base in bases for package, base in PACKAGES.items())


def _is_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def foreign(module: str) -> str:
    """Return why a module is not the user's own; empty if it is.

    Its folders decide, including the targets of links.

    Raises:
        ModuleNotFoundError: If there is none.
    """
    if module == "__main__":  # the program that runs
        return ""
    if (places := _places(module)) is None:
        return "it is built into Python"
    for place in places:
        for path in (Path(place), Path(os.path.realpath(place))):
            if INSTALLED & {*path.parts}:
                return f"it is installed, at {path}"
            if any(path.is_relative_to(root) for root in _library()):
                return "it is in Python's standard library"
    return ""


@functools.cache
def _library() -> frozenset[Path]:
    """List the folders of the standard library."""
    paths = sysconfig.get_paths()
    found = [paths["stdlib"], paths["platstdlib"], str(Path(os.__file__).parent)]
    return frozenset(Path(each(path)) for path in found for each in (str, os.path.realpath))


def _places(module: str) -> list[str] | None:
    """Find the files or folders of a module and of the packages around it, importing nothing.

    Returns:
        Paths; none of a module that a program has made; None of one that is part of Python itself.

    Raises:
        ModuleNotFoundError: If there is none.
    """
    found: list[str] = []
    path: Sequence[str] | None = None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        name = ".".join(parts[:end])
        known = sys.modules.get(name)
        spec = getattr(known, "__spec__", None)
        if known is not None and spec is None:  # made by a program, or its script
            found += [each] if isinstance(each := getattr(known, "__file__", None), str) else []
            path = getattr(known, "__path__", None)
            continue
        finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
        specs = (finder.find_spec(name, path, None) for finder in finders)
        spec = spec or next((each for each in specs if each is not None), None)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        if spec.origin in {"built-in", "frozen"}:
            return None
        path = spec.submodule_search_locations
        found += [spec.origin] if spec.origin else [*(path or ())]
        if path is None and end < len(parts):
            raise ModuleNotFoundError(f"No module named {module!r}; {name!r} is not a package")
    return found
