"""Choices that are said in Python, as the config that the command line would compose."""

from __future__ import annotations

import inspect
import numbers
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fedraclora.binding import PlainDict
from fedraclora.compose.choices import groups
from fedraclora.compose.overrides import BLANK, composed, key_of
from fedraclora.compose.resume import laid_over
from fedraclora.config.run_config import RunConfig, targets_of
from fedraclora.errors import ConfigError
from fedraclora.limits import TakesObject, later_keys
from fedraclora.objects import lend
from fedraclora.schema import hints
from fedraclora.strategies.methods import METHODS

BARE = re.compile(r"[A-Za-z_][\w./-]*")  # strings that Hydra reads as they are
ESCAPED = re.compile(r"[\\()\[\]{}:=, \t]")  # in the keys of a mapping, which have no quotes
# Keys that Hydra may read as something else: by their beginning, with some that it does not.
NUMBER = re.compile(r"[+-]?\.?\d|[+-]?(nan|inf|null|true|false)$", re.IGNORECASE)
NOT_STRINGS = {"null", "true", "false", "nan", "inf"}


def config_of(
    choices: tuple[str | Mapping[str, object], ...], keys: Mapping[str, object]
) -> tuple[PlainDict, list[str]]:
    """Compose the config that is asked for.

    Returns:
        The resolved config, and the keys that were said.

    Raises:
        ConfigError: If it does not compose, or a value is none that a config can hold.
    """
    if len(choices) == 1 and isinstance(choices[0], Mapping) and is_whole(choices[0]):
        whole = nowhere({str(k): plain_value(str(k), value) for k, value in choices[0].items()})
        values = {key: plain_value(key, value) for key, value in keys.items()}
        return laid_over(whole, values), [word.partition("=")[0] for word in words_of(values)]
    words: list[str] = []
    for choice in (*choices, keys):
        if isinstance(choice, str):
            words.append(choice)
        elif isinstance(choice, Mapping):
            words += words_of(choice)
        else:
            raise ConfigError(
                f"{choice!r:.200} is of type {type(choice).__name__}; a word such as "
                "'method=fedavg' or a mapping of keys is wanted"
            )
    return composed(words), [key_of(word) for word in words]


def is_whole(mapping: Mapping[str, object]) -> bool:
    """Check whether a mapping has every key of a config, but for those of later releases."""
    wanted = {*inspect.signature(RunConfig).parameters} - {"plain", *later_keys(RunConfig)}
    return wanted <= {*mapping}


def nowhere(config: PlainDict) -> PlainDict:
    """Drop from a config what says where its run was: the folder, and whether it went on."""
    return laid_over(config, {"output.dir": None, "resume": None})


def words_of(mapping: Mapping[str, object], before: str = "") -> list[str]:
    """Write nested choices as words of the command line.

    Example:
        >>> words_of({"local": {"lr": 0.1}, "data": {"name": "digits", "labels": [5, 6]}})
        ['local.lr=0.1', 'data=digits', 'data.labels=[5,6]']
    """
    words = []
    for key, value in mapping.items():
        path = f"{before}{key}"
        if isinstance(value, Mapping) and not before:
            words += words_of(value, f"{path}.")
        elif key == "name" and before and before[:-1] in groups():
            words.append(f"{before[:-1]}={literal(path, value)}")
        else:
            words.append(f"{path}={literal(path, value)}")
    return words


def literal(key: str, value: object) -> str:
    r"""Write a value as Hydra reads it.

    Args:
        key: Whose it is, for the message.
        value: The value.

    Raises:
        ConfigError: If no config can hold it.

    Example:
        >>> literal("a", [None, True, 0.5, "it's", "null", {"*": 1}])
        "[null,true,0.5,'it\\'s','null',{*:1}]"
    """
    value = plain_value(key, value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        if BARE.fullmatch(value) and value.lower() not in NOT_STRINGS:
            return value
        escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (m[2] and r"\'"), value)
        return f"'{escaped}'"
    if isinstance(value, list):
        return f"[{','.join(literal(key, v) for v in value)}]"
    if isinstance(value, dict):
        marked = {f"{k}{BLANK}" if NUMBER.match(k) else k: v for k, v in value.items()}
        pairs = ((ESCAPED.sub(r"\\\g<0>", k), literal(key, v)) for k, v in marked.items())
        return f"{{{','.join(f'{name}:{text}' for name, text in pairs)}}}"
    return repr(value)


@cache
def takes_objects(key: str) -> bool:
    """Check whether the value of a key, or of one in a list of them, may be an object."""
    group, _, leaf = key.partition(".")
    homes = targets_of(METHODS).get(group, {}).values() if leaf else [RunConfig]
    marks = (getattr(hints(home).get(leaf or group), "__metadata__", ()) for home in homes)
    return any(isinstance(mark, TakesObject) for found in marks for mark in found)


def plain_value(key: str, value: object) -> object:
    """Turn a value into plain ones: dicts, lists, strings, numbers, None.

    An object of the program is lent, where the key takes one.

    Raises:
        ConfigError: If it is something else.
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
        return lend(value)
    raise ConfigError(
        f"{key} is of type {type(value).__name__}; a number, a string, a list or a mapping is "
        "wanted"
    )
