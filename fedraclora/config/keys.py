"""Read the keys of the config from the classes and functions that use them.

Each key is defined once: as a field or an argument, with its type and limits, its default, and its
line in the docstring. The files in ``conf`` and the output of ``--help`` are derived from these.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass

from fedraclora.config.run_config import (
    KINDS,
    ROWS,
    SECTIONS,
    RunConfig,
    targets_of,
)
from fedraclora.config.table_rows import BESIDE, GIVEN
from fedraclora.limits import HydraDefault, OneOf, Part
from fedraclora.object_registry import NAME
from fedraclora.protocol.method import Method
from fedraclora.schema import hints, nested_rows
from fedraclora.training.extras.settings import OWN_KEYS
from fedraclora.training.localconfig import ADAPTIVE_KEYS

Target = Callable[..., object]
SECTION = re.compile(r"(Attributes|Args):")
REFERENCE = re.compile(r" \(`[\w.]+`\)")
# as plain values of a config
WORDS = (("None", "null"), ("False", "false"), ("True", "true"), ("`", ""))
ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")


def nodes(methods: Mapping[str, type[Method]]) -> dict[str, dict[str, object]]:
    """Return all defaults in code, for Hydra to compose: path -> keys.

    Args:
        methods: The METHODS table of `strategies`.

    Returns:
        ``group/choice`` for each row of a table, and for the neutral choice of each group with one
        class; ``group/key/name`` for the options of a key that is a group itself;
        ``local/adaptive``, ``local/own`` for keys that only some choices list; ``run`` for keys
        without a group.
    """
    found: dict[str, dict[str, object]] = {}
    for group, table in targets_of(methods).items():
        for name, target in table.items():
            if name == NAME:  # an object of a program, which cannot be chosen by name
                continue
            node = node_of(target, given=GIVEN.get(group, ()))
            home, keys = BESIDE.get(group, (target, ()))
            beside = node_of(home)
            found[f"{group}/{name}"] = {"name": name, **{k: beside[k] for k in keys}, **node}
            for key, inner in tables_of(target):
                found[f"{group}/{key}/{inner[0]}"] = {"name": inner[0], **node_of(inner[1])}
    for part in (ADAPTIVE_KEYS.name, OWN_KEYS.name):
        found[f"local/{part}"] = node_of(KINDS["local"], part=part)
    alone = node_of(RunConfig, given=(*inspect.signature(RunConfig).parameters,))
    found["run"] = {key: value for key, value in alone.items() if key not in ROWS}
    found["run"] |= {key: node_of(kind) for key, kind in SECTIONS.items()}
    return found


def choices_with(key: str, methods: Mapping[str, type[Method]]) -> list[str]:
    """List the choices of a group that have a key, such as the methods with ``method.rank``.

    Args:
        key: A path with one dot.
        methods: The METHODS table of `strategies`.

    Returns:
        Names of rows; the group itself if it has one class.
    """
    group, _, inner = key.partition(".")
    table = targets_of(methods).get(group, {})
    if group in KINDS:
        table = {group: KINDS[group]}
    return [name for name, row in table.items() if inner in inspect.signature(row).parameters]


def node_of(target: Target, *, part: str = "", given: tuple[str, ...] = ()) -> dict[str, object]:
    """Return the keys of a class or a function, at their defaults.

    Args:
        target: The class or the function.
        part: Select the keys of a `Part` with this name.
        given: Arguments that are no keys of the config, unless they have a default.

    Returns:
        Plain values; ``???`` for keys without a default.
    """
    node: dict[str, object] = {}
    made = {f.name: f.default_factory for f in fields(target)} if is_dataclass(target) else {}
    for key, parameter in inspect.signature(target).parameters.items():
        marks = getattr(hints(target).get(key), "__metadata__", ())
        if part != next((mark.name for mark in marks if isinstance(mark, Part)), ""):
            continue
        if composed := [mark.value for mark in marks if isinstance(mark, HydraDefault)]:
            node[key] = composed[0]
        elif parameter.default is not parameter.empty:
            maker = made.get(key, MISSING)
            default = parameter.default if maker is MISSING else maker()
            node[key] = list(default) if isinstance(default, tuple) else default
        elif key not in given:
            node[key] = "???"
    return node


def help_of(target: Target, path: str, node: object) -> str:
    """Return the description of a key, from its docstring.

    Args:
        target: The class or the function that reads it.
        path: The key: its name, or several names with dots for nested groups.
        node: The group that the target reads.

    Returns:
        Its line, with its possible values; empty if it has no description.
    """
    key, _, inner = path.partition(".")
    if not (kind := hints(target).get(key)):
        return ""
    if inner:
        group = node.get(key) if isinstance(node, Mapping) else None
        row = nested_rows(kind).get(str(group.get("name"))) if isinstance(group, Mapping) else None
        if row:
            return help_of(row, inner, group) or summary(row)
    marks = (mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, OneOf))
    choices = [word for mark in marks for word in mark.choices]
    text = lines(target).get(key, "")
    if any(word not in text for word in choices):
        text += f" One of {', '.join(choices)}."
    text = REFERENCE.sub("", text).strip()
    return functools.reduce(lambda said, word: said.replace(*word), WORDS, text)


def summary(target: Target) -> str:
    """Return the first line of a docstring, which describes a choice."""
    return inspect.cleandoc(target.__doc__ or "").partition("\n")[0].replace("``", "")


def bullet(text: str, name: str) -> str:
    """Return what a docstring says under ``- NAME:``, in one line; empty if it does not."""
    found = re.search(rf"^- {name}: (.*?)(?=\n- |\Z)", text, re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def tables_of(target: Target) -> Iterator[tuple[str, tuple[str, Target]]]:
    """List the classes of each key that is a group itself: key -> name, class."""
    for key in inspect.signature(target).parameters:
        for name, row in nested_rows(hints(target).get(key)).items():
            yield key, (name, row)


@functools.cache
def lines(target: Target) -> Mapping[str, str]:
    """Read the description of each attribute or argument, those of base classes included."""
    homes = reversed(target.__mro__) if inspect.isclass(target) else [inspect.unwrap(target)]
    return {key: text for home in homes for key, text in _entries(home.__doc__ or "")}


def _entries(doc: str) -> Iterator[tuple[str, str]]:
    """Read the entries of the sections ``Attributes`` and ``Args``."""
    names: list[str] = []
    text = ""
    inside = False
    for line in [*inspect.cleandoc(doc).splitlines(), "end"]:
        found = ENTRY.fullmatch(line)
        if names and (found or not line.startswith("  ")):
            yield from ((name, text) for name in names)
            names = []
        if not line.startswith(" "):
            inside = bool(SECTION.fullmatch(line)) or (inside and not line)
        elif inside and found:
            names, text = found[1].split(", "), found[2].replace("``", "")
        elif names:
            text += f" {line.strip()}".replace("``", "")
