"""Compose from Python values the same config as the command line would."""

from __future__ import annotations

import inspect
import numbers
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from fedraclora.binding import PlainDict
from fedraclora.compose.choices import groups
from fedraclora.compose.overrides import composed, key_of
from fedraclora.compose.resume import with_changes
from fedraclora.config.run_config import RunConfig, targets_of
from fedraclora.errors import ConfigError, unknown
from fedraclora.limits import AcceptsObject, later_keys
from fedraclora.object_registry import register_object
from fedraclora.schema import hints
from fedraclora.strategies.methods import METHODS

NAME_OF_CHOICE = re.compile(r"[\w./:-]+")  # of a file, a row, or ``module:name``


def config_of(
    choices: tuple[str | Mapping[str, object], ...], keys: Mapping[str, object]
) -> tuple[PlainDict, list[str]]:
    """Compose a config from choices and keys.

    Args:
        choices: Overrides, as strings, and nested mappings of keys; later ones win.
        keys: The same as a last mapping.

    Returns:
        The resolved config, and the keys that were set.

    Raises:
        ConfigError: If it does not compose, or a config cannot hold a value.
    """
    if len(choices) == 1 and isinstance(choices[0], Mapping) and is_whole(choices[0]):
        whole = without_location(
            {str(k): plain_value(str(k), value) for k, value in choices[0].items()}
        )
        values = {key: plain_value(key, value) for key, value in keys.items()}
        return with_changes(whole, values), [key for key, _ in pairs_of(values)]
    words: list[str] = []
    values, typed = {}, []
    for choice in (*choices, keys):
        if isinstance(choice, str):
            words.append(choice)
            typed.append(key := key_of(choice))
            if key not in groups():  # a choice leaves keys that were set
                values = {k: v for k, v in values.items() if not f"{k}.".startswith(f"{key}.")}
        elif isinstance(choice, Mapping):
            for key, value in pairs_of(choice):
                typed.append(key_of(key))
                if key in groups():
                    words.append(choice_word(key, value))
                else:
                    values.pop(key, None)
                    values[key] = plain_value(key_of(key), value)
        else:
            raise ConfigError(
                f"{choice!r:.200} is of type {type(choice).__name__}: give an argument such as "
                "'local=adamw' or a mapping of keys"
            )
    return composed(words, values), typed


def is_whole(mapping: Mapping[str, object]) -> bool:
    """Return whether a mapping has every key of a config, except those of later releases."""
    wanted = {*inspect.signature(RunConfig).parameters} - {"plain", *later_keys(RunConfig)}
    return wanted <= {*mapping}


def without_location(config: PlainDict) -> PlainDict:
    """Drop the folder of a run, and whether it resumed one, from a config."""
    return with_changes(config, {"output.dir": None, "resume": None})


def pairs_of(mapping: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """List nested choices by their keys; ``name`` is the choice of its group.

    Example:
        >>> [*pairs_of({"local": {"lr": 0.1}, "data": {"name": "digits", "labels": [5, 6]}})]
        [('local.lr', 0.1), ('data', 'digits'), ('data.labels', [5, 6])]
    """
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"the key {key!r} of a mapping: expected the name of a setting, such as 'local.lr'"
            )
        if not isinstance(value, Mapping) or "." in key:
            yield key, value
            continue
        for inner, one in value.items():
            yield (key if inner == "name" and key in groups() else f"{key}.{inner}"), one


def choice_word(group: str, name: object) -> str:
    """Write the choice of a group as Hydra's override.

    Raises:
        ConfigError: If no choice has such a name.
    """
    name = plain_value(f"{group}.name", name)
    if name is not None and not (isinstance(name, str) and NAME_OF_CHOICE.fullmatch(name)):
        raise unknown(group, name, groups()[group])
    return f"{group}={'null' if name is None else name}"


@cache
def takes_objects(key: str) -> bool:
    """Return whether the value of a key, or an element of its list, may be an object."""
    group, _, leaf = key.partition(".")
    homes = targets_of(METHODS).get(group, {}).values() if leaf else [RunConfig]
    marks = (getattr(hints(home).get(leaf or group), "__metadata__", ()) for home in homes)
    return any(isinstance(mark, AcceptsObject) for found in marks for mark in found)


def plain_value(key: str, value: object) -> object:
    """Convert a value to plain ones: dicts, lists, strings, numbers, None.

    An object of the program is registered, if the key accepts objects.

    Raises:
        ConfigError: If the value is of another type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | Path):  # text of numpy is no text to YAML
        return str(value)
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Mapping):
        return {str(k): plain_value(f"{key}.{k}", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(key, v) for v in value]
    if takes_objects(key.removesuffix(".name")):
        return register_object(value)
    raise ConfigError(
        f"{key} is of type {type(value).__name__}: give a number, a string, a list or a mapping"
    )
