"""List the choices of the config groups: those that code defines, and the files of ``conf``.

A class or function that reads a group is a choice of it, with its defaults (`config.keys`), and is
in Hydra's config store. A file defines another choice by its differences. Its ``defaults`` name
what it builds on: ``[sgd]`` is a choice of its group, ``[/sentences]`` a file beside
``config.yaml`` that is no choice, and ``[/row/data/text]`` the code's defaults for a choice with a
file of the same name.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf
from typing_extensions import override

from fedraclora.binding import OWN_GROUPS, row_of
from fedraclora.compatibility import compatibility_note
from fedraclora.compose import CONF
from fedraclora.compose.presets import readable, take_own
from fedraclora.config.keys import bullet, help_of, node_of, nodes, summary
from fedraclora.config.run_config import NAMED, SECTIONS, RunConfig, targets_of
from fedraclora.config.table_rows import BESIDE, GIVEN
from fedraclora.errors import unknown
from fedraclora.strategies.methods import METHODS
from fedraclora.trust import is_function
from fedraclora.weights.files import flatten

GLOBAL = "@package _global_"  # its keys are those of the config itself: clients, data.file
ROW = "row/"
WIDTH = 100  # of a line of help
FUNCTIONS = ("model", "data")  # groups with a choice that is named function, and calls one
WHOLE = ("data",)  # groups whose choices set keys of other groups, too

NODES = nodes(METHODS)
CHOICE_ROWS = targets_of(METHODS)
STORE = ConfigStore.instance()
# Hydra copies the one store for each config that it composes, and again what it reads of it.
STORE.__deepcopy__ = lambda _: STORE  # type: ignore[attr-defined]
for _path, _node in NODES.items():
    _above, _, _name = _path.rpartition("/")
    _package = _above.replace("/", ".") or "_global_"
    STORE.store(_name, _node, f"{ROW}{_above}".rstrip("/"), _package)
    if _name in CHOICE_ROWS.get(_above, ()) and not (CONF / f"{_path}.yaml").is_file():
        STORE.store(_name, _node, _above, _package)


def own_node(group: str, name: str) -> dict[str, object]:
    """Write the keys of a choice that is an object of the user's, ``module:name``.

    Raises:
        ConfigError: If it cannot be imported, or is not of the group's kind.
    """
    if group in FUNCTIONS:
        own: dict[str, object] = {"function": name}
        own = {group: own} if group in WHOLE else own
        return {"defaults": ["function", "_self_"], **own}
    node = node_of(row_of(group, CHOICE_ROWS[group], name), given=GIVEN.get(group, ()))
    home, keys = BESIDE.get(group, (None, ()))
    return {"name": name, **node, **{key: node_of(home)[key] for key in keys if home}}


class OwnChoices(dict[str, Any]):
    """Hold the choices of a group in Hydra's store, with every ``module:name`` among them.

    Args:
        group: Its name.
        listed: Its listed choices.
    """

    def __init__(self, group: str, listed: Mapping[str, Any]) -> None:
        super().__init__(listed)
        self.group = group

    @override
    def __contains__(self, file: object) -> bool:
        name, suffix, _ = str(file).rpartition(".yaml")
        return super().__contains__(file) or (bool(suffix) and is_function(name))

    def __missing__(self, file: str) -> Any:
        """Write the node of a choice."""
        node = OmegaConf.create(own_node(self.group, file.removesuffix(".yaml")))
        package = "_global_" if self.group in WHOLE else self.group
        return ConfigNode(file, node, self.group, package, None)


for _group in (*OWN_GROUPS, *FUNCTIONS):
    STORE.repo[_group] = OwnChoices(_group, STORE.repo.get(_group, {}))


@cache
def groups() -> Mapping[str, Mapping[str, str]]:
    """List the config groups: group -> choice -> its description."""
    found: dict[str, dict[str, str]] = {}
    for path in NODES:
        group, _, name = path.rpartition("/")
        if name in CHOICE_ROWS.get(group, ()):
            found.setdefault(group, {})[name] = summary(CHOICE_ROWS[group][name])
    for file in CONF.glob("*/*.yaml"):
        found.setdefault(file.parent.name, {})[file.stem] = _comment(file)[0]
    return {group: dict(sorted(found[group].items())) for group in sorted(found)}


def sections() -> dict[str, str]:
    """List the keys and sections of the config that are not groups, each with its description."""
    return {name: help_of(RunConfig, name, {}) for name in NODES["run"]}


def section_keys(name: str) -> str:
    """Write the description of a section, and a line for each of its keys, as `keys_of` does."""
    node = NODES["run"][name]
    if not isinstance(node, Mapping):
        return "\n".join(_explained([], {name: node}))
    return "\n".join([name, *_explained([sections()[name]], {name: node})])


def choice(group: str, name: str, *, folders: Sequence[Path] = ()) -> dict[str, object]:
    """Read a choice of a group with everything that it builds on, as Hydra composes it.

    Args:
        group: For example ``local``.
        name: Of the choice. Choices of other groups that it makes (some data do) are left out.
        folders: Where to look for it beside ``conf``.

    Returns:
        Its keys; those of the whole config if the file is for the whole. Nothing is resolved.

    Raises:
        ConfigError: If there is no such choice.

    Example:
        >>> momentum = choice("local", "momentum")
        >>> momentum["momentum"], momentum["batch_size"]
        (0.9, 16)
    """
    roots = [CONF, *folders]
    found = _merged(lineage(f"{group}/{name}", roots))
    own = found[group] if not _is_whole(_file(f"{group}/{name}", roots)) else found
    return {str(k): v for k, v in dict(own).items()}  # type: ignore[call-overload]


def lineage(name: str, roots: Sequence[Path] = (CONF,)) -> list[dict[str, object]]:
    """List the parts that a config is composed of: its defaults in order, then its own keys.

    Args:
        name: Its path below a root, without the suffix.
        roots: Folders; the first that has the file is used.

    Returns:
        Parts of the config, each with its keys in their places.

    Raises:
        ConfigError: If there is no such config.
    """
    group, _, last = name.rpartition("/")
    if (file := _file(name, roots)) is None:
        if (node := NODES.get(name.removeprefix(ROW))) is not None:
            return [_placed(group.removeprefix(ROW), node)]
        if is_function(last) and group in FUNCTIONS:
            return [*lineage(f"{group}/function", roots), {group: {"function": last}}]
        if is_function(last) and group in OWN_GROUPS:
            return [_placed(group, own_node(group, last))]
        there = {path.stem for root in roots for path in (root / group).glob("*.yaml")}
        raise unknown(group, last, there | {*groups().get(group, ())})
    with readable(file):
        read = OmegaConf.load(file)
    take_own(file)  # help imports nothing that another file names
    loaded = OmegaConf.to_container(read, resolve=False) or {}
    own = {str(k): v for k, v in dict(loaded).items()}  # type: ignore[arg-type]
    found = []
    for base in own.pop("defaults", ()):
        if isinstance(base, str) and base != "_self_":  # the others choose in other groups
            above = "" if base.startswith("/") or not group else f"{group}/"
            found += lineage(above + base.lstrip("/"), roots)
    return [*found, own if _is_whole(file) else _placed(group, own)]


def _file(name: str, roots: Sequence[Path]) -> Path | None:
    return next((file for root in roots if (file := root / f"{name}.yaml").is_file()), None)


def _is_whole(file: Path | None) -> bool:
    return file is not None and GLOBAL in file.read_text(encoding="utf-8")


def _placed(group: str, keys: Mapping[str, object]) -> dict[str, object]:
    """Put keys at the place of their group in the config."""
    found = dict(keys)
    for part in reversed(group.split("/") if group else []):
        found = {part: found}
    return found


def _merged(parts: Sequence[dict[str, object]]) -> dict[str, object]:
    merged = OmegaConf.to_container(OmegaConf.merge(*parts), resolve=False)
    return {str(k): v for k, v in dict(merged).items()}  # type: ignore[arg-type]


def keys_of(group: str, name: str, *, folders: Sequence[Path] = ()) -> str:
    """Write the description of a choice, and for each of its keys a line with value and meaning.

    Args:
        group: For example ``local``.
        name: Of the choice.
        folders: Where to look for it beside ``conf``.

    Raises:
        ConfigError: If there is no such choice.
    """
    file = _file(f"{group}/{name}", [CONF, *folders])
    about = [summary(_row(group, name))] if file is None else _comment(file)
    kind = CHOICE_ROWS.get(group, {}).get(name)
    beside = compatibility_note(kind) if kind else ""
    held = bullet(sys.modules[kind.__module__].__doc__ or "", "Held to") if kind else ""
    beside = "  ".join(filter(None, (held and f"Held to {held}", beside)))
    about += [*textwrap.wrap(beside, WIDTH, break_on_hyphens=False), ""]
    head = [f"  {line}".rstrip() for line in about]
    return "\n".join([f"{group}={name}", *head, *key_lines(group, name, folders=folders)])


def key_lines(group: str, name: str, *, folders: Sequence[Path] = ()) -> list[str]:
    """Write a line for each key of a choice, and of what it builds on; see `keys_of`."""
    return _explained([], _merged(lineage(f"{group}/{name}", [CONF, *folders])))


def _explained(about: Sequence[str], config: Mapping[str, object]) -> list[str]:
    """Write a description, and for each key a line with its value and its meaning."""
    rows = [
        (f"{key}={value if isinstance(value, str) else json.dumps(value)}", meaning(key, config))
        for key, value in flatten(config).items()
    ]
    width = max((len(word) for word, text in rows if text and len(word) < WIDTH // 2), default=0)
    lines = [*about, *([""] if about else [])]
    for word, text in rows:
        broken = textwrap.wrap(text, WIDTH - width, break_on_hyphens=False) or [""]
        if len(word) > width:
            lines, word = [*lines, word], ""  # noqa: PLW2901
        for line in broken:
            lines.append(f"{word:<{width}}  {line}")
            word = ""  # noqa: PLW2901
    return [f"  {line}".rstrip() for line in lines]


def meaning(key: str, config: Mapping[str, object]) -> str:
    """Return the description of a key: the docstring's line of its field or argument."""
    group, _, inner = key.partition(".")
    node = config.get(group)
    if not inner or not isinstance(node, Mapping):
        return help_of(RunConfig, key, config)
    if group in SECTIONS:
        return help_of(SECTIONS[group], inner, node)
    row = NAMED.get(group, str(node.get("name")))
    home, keys = BESIDE.get(group, (None, ()))
    home = home if inner in keys else _row(group, row)
    return help_of(home, inner, node) if home else ""


def _row(group: str, name: str) -> Any:
    """Return the reader of a choice's keys, which may be the user's own; None if there is none."""
    rows = CHOICE_ROWS.get(group, {})
    return row_of(group, rows, name) if is_function(name) else rows.get(name)


def _comment(path: Path) -> list[str]:
    """Read the comment at the start of a file, without the header line for Hydra."""
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines()
    head = takewhile(lambda text: text.startswith("#"), lines)
    return [text.removeprefix("#").strip() for text in head if "@package" not in text]
