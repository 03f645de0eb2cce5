"""Apply Hydra's overrides, and explain errors in them.

``key=value`` sets a key, ``group=choice`` chooses a file, ``+key`` adds and ``~key`` removes. An
override with ``++`` is skipped if the chosen options do not read the key, so that one command can
sweep over choices of which only some have it:

    -m attack=none,sign_flip ++attack.scale=5
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from fedraclora.binding import EMPTY, Plain, PlainDict
from fedraclora.compose import CONF
from fedraclora.compose.choices import choice, groups
from fedraclora.compose.words import part_folders
from fedraclora.config.keys import choices_with
from fedraclora.config.run_config import NAMED, from_plain
from fedraclora.config.unread import unknown_key
from fedraclora.errors import ConfigError, MissingKeysError, UnreadKeysError, unknown
from fedraclora.strategies.methods import METHODS
from fedraclora.weights.files import flatten

# How Hydra begins what it has to say.
NO_SUCH_KEY = re.compile(r"Could not (?:override|delete from config\.) '([^']+)'")
IS_THERE = re.compile(r"Could not append to config\. An item is already at '([^']+)'")
NO_FOLDER = r"provider=hydra\.searchpath"
SWEEP = re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?:\n| requires)")


def key_of(word: str) -> str:
    """Extract the key of an override.

    Example:
        >>> key_of("++local.lr=0.1")
        'local.lr'
    """
    return word.lstrip("+~").partition("=")[0]


def composed(words: Sequence[str], values: Plain = EMPTY) -> PlainDict:
    """Compose the config as the command line would, as a plain, resolved dict.

    Args:
        words: Hydra's overrides, for example ``["local=adamw", "seed=1"]``, and
            ``--config-dir DIR``.
        values: Plain values by key, set in the composed config before it is resolved.

    Returns:
        The config.

    Raises:
        ConfigError: If it does not compose.
    """
    words = searched(words)

    def once(words: Sequence[str]) -> PlainDict:
        return compose_once(words, values)

    with (
        in_plain_words([*words, *(f"{key}={value}" for key, value in values.items())]),
        initialize_config_dir(version_base="1.3", config_dir=str(CONF)),
    ):
        return without_idle(once(words), words, once)


def compose_once(words: Sequence[str], values: Plain) -> PlainDict:
    """Compose as ``composed`` does, where Hydra is initialized; errors are Hydra's."""
    cfg = compose("config", overrides=list(words), return_hydra_config=True)
    apply_values(cfg, values)
    return plain_of(cfg, cfg.hydra.runtime.choices)


def apply_values(cfg: DictConfig, values: Plain) -> None:
    """Set keys of a composed config, as overrides do; a mapping is merged into the existing one.

    Args:
        cfg: The config, which is changed.
        values: By key; a key with ``+`` is added.

    Raises:
        ConfigCompositionException: From Hydra, if there is no such key.
        ConfigError: If a value cannot be read.
    """
    for key, value in values.items():
        added = key.startswith("+")
        try:
            OmegaConf.update(cfg, key_of(key), value, merge=True, force_add=added)
        except (ConfigAttributeError, ConfigKeyError) as error:
            raise ConfigCompositionException(f"Could not override '{key}'.") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key} is {value!r}: {' '.join(str(error).split())}") from error


def plain_of(cfg: DictConfig, choices: Mapping[str, object]) -> PlainDict:
    """Resolve a config to a plain dict.

    Args:
        cfg: Hydra's config; Hydra's own node is left out.
        choices: The file of each group.

    Raises:
        ConfigError: If a value is missing, or a group has the name of another choice.
    """
    cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise MissingKeysError(
            f"{', '.join(missing)}: ??? marks a value that you must give: set "
            + " ".join(f"{key}=VALUE" for key in missing),
            missing,
        )
    found = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    plain: PlainDict = {str(key): _keyed(str(key), v) for key, v in dict(found).items()}  # type: ignore[arg-type]
    for group in NAMED:
        section, choice = plain.get(group), choices.get(group)
        if not isinstance(choice, str) or not isinstance(section, Mapping):
            continue
        if (name := section.get("name", choice)) != choice:
            raise ConfigError(
                f"{group}.name={name!r}, but the choice is {group}={choice}, and a name does not "
                f"change it. Write {group}={name} to choose another; in your own file give the "
                "name of the file."
            )
    return plain


def _keyed(path: str, value: object) -> object:
    """Convert the keys of mappings to text, as in JSON: layers may be named by numbers.

    Raises:
        ConfigError: If the name of a layer was read as a fraction: 0.1 may have been 0.10.
    """
    if isinstance(value, list):
        return [_keyed(path, element) for element in value]
    if not isinstance(value, dict):
        return value
    for key in value if path.startswith("method.") else ():
        if isinstance(key, float):
            raise ConfigError(
                f"{path} has the key {key}, which is read as a number, not as the name of a "
                f"layer. Name the layer's weight ({key}.weight), or quote the name in a YAML "
                "file."
            )
    return {name: _keyed(f"{path}.{name}", v) for k, v in value.items() if (name := str(k))}


def without_idle(
    plain: PlainDict, words: Sequence[str], again: Callable[[Sequence[str]], PlainDict]
) -> PlainDict:
    """Leave out arguments with ``++`` that have no effect on the chosen options.

    Args:
        plain: The config with all words.
        words: The overrides.
        again: Composes the config of other words.

    Returns:
        The config without them; each is named on stderr.

    Raises:
        ConfigError: If the config is invalid for another reason, such as a key that no choice
            has.
    """
    while any(word.startswith("++") for word in words):
        try:
            from_plain(plain, METHODS)
        except UnreadKeysError as error:
            idle = [w for w in words if w.startswith("++") and key_of(w) in error.keys]
            if not idle or any(not choices_with(key_of(w), METHODS) for w in idle):
                raise
            for word in idle:
                print(
                    f"note: {key_of(word)} has no effect here: {word} is left out", file=sys.stderr
                )
            words = [word for word in words if word not in idle]
            plain = again(words)
        else:
            break
    return plain


def searched(words: Sequence[str]) -> list[str]:
    """Turn ``--config-dir DIR`` into the override that does the same: ``hydra.searchpath``.

    Raises:
        ConfigError: If there is no such folder.
    """
    named, rest = part_folders(words)
    for flag, folder in named:
        if not folder or not Path(folder).is_dir():
            raise ConfigError(f"{flag} {folder!r}: this folder of configs does not exist")
    folders = [f"file://{Path(folder).resolve()}" for _, folder in named]
    typed = [word for word in rest if key_of(word) == "hydra.searchpath"]
    folders += [word.partition("=")[2].strip("[]") for word in typed]
    path = [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
    return [*(word for word in rest if word not in typed), *path]


def is_override(word: str) -> bool:
    """Distinguish overrides from flags and their values."""
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def flags_first(words: Sequence[str]) -> list[str]:
    """Move overrides behind flags: Hydra reads them in one piece.

    Example:
        >>> flags_first(["seed=1", "--config-dir", "mine", "rounds=2"])
        ['--config-dir', 'mine', 'seed=1', 'rounds=2']
    """
    return [*(word for word in words if not is_override(word)), *filter(is_override, words)]


@contextmanager
def in_plain_words(words: Sequence[str]) -> Iterator[None]:
    """Turn Hydra's errors into errors of this project.

    Args:
        words: What was typed.

    Raises:
        ConfigError: In place of Hydra's errors.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", NO_FOLDER, UserWarning)
            yield
    except HydraException as error:
        raise explained(error, [*filter(is_override, searched(words))]) from error
    except ValueError as error:
        if not str(error).startswith("Config group override"):
            raise
        typed = [word for word in words if is_override(word) and _choosable(key_of(word))]
        raise ConfigError(
            f"{' '.join(typed)}: a group is chosen by the name of one of its files, as in "
            f"local=adamw ({error})"
        ) from error
    except UserWarning as error:
        if not re.match(NO_FOLDER, str(error)):
            raise
        raise ConfigError(
            f"hydra.searchpath names a folder that does not exist: {error}"
        ) from error


def explained(error: HydraException, words: Sequence[str]) -> ConfigError:
    """Convert an error of Hydra to one with a remedy.

    Args:
        error: Hydra's.
        words: The overrides.
    """
    text = (str(error) or str(error.__cause__)).partition("\nTo append to your config")[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).partition("/")
        return unknown(group, choice, error.options)
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        plain = value and not re.search(r"""["'\\\[{]""", value)
        quoted = f"'{key}=\"{value}\"'" if plain else "\"key=';'\""
        return ConfigError(
            f"{error.override!r} cannot be read as key=value, which is written without blanks "
            f"({text.splitlines()[0]}); what holds other signs stands in quotes of its own, "
            f"{quoted}; in a list "
            "[a, b] or a mapping {a: 1, *: 2} names stand without quotes, and the shell wants "
            "quotes around the whole: 'key=[a, b]'"
        )
    if NO_SUCH_KEY.search(text):
        return _unknown_keys(words, text)
    if found := IS_THERE.search(text):
        return ConfigError(f"the config has the key {found[1]} already: write it without the +")
    if found := SWEEP.search(text):
        key, _, values = found[1].partition("=")
        ways = f"; a list is written '{key}=[{values}]', a text '{key}=\"{values}\"'"
        listed = "" if "(" in values else ways
        return ConfigError(
            f"{found[1]} is a sweep, one run for each value, which needs -m: fedraclora simulate "
            f"-m '{found[1]}'{listed} (the quotes are for the shell)"
        )
    return ConfigError(" ".join(text.split()))


def _unknown_keys(words: Sequence[str], text: str) -> ConfigError:
    """Name all keys among what was typed that do not exist, with the nearest that do."""
    groups = [word for word in words if "." not in key_of(word) and _choosable(key_of(word))]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        path = [word for word in words if key_of(word) == "hydra.searchpath"]
        first = [re.sub(r"=([^\[(]*?),.*", r"=\1", word) for word in groups]  # of a sweep
        cfg = compose("config", overrides=[*first, *path], return_hydra_config=True)
    keys = flatten(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[arg-type]
    own = [key for key in keys if not key.startswith("hydra.")]
    there = [*dict.fromkeys([*map(str, cfg), *own])]
    lines = []
    for word in words:
        key = key_of(word)
        if word.startswith("+") or word in groups or key in there or key.startswith("hydra"):
            continue
        if OmegaConf.select(cfg, key, default=None) is not None:
            continue
        group, _, inner = key.partition(".")
        if rows := choices_with(key, METHODS) or _deep(group, inner):
            lines.append(
                f"{group}={cfg[group].get('name')} has no key {inner}; these have it: "
                f"{', '.join(rows)} (in a sweep over them and others write ++{word})"
            )
        else:
            lines.append(unknown_key(key, there))
    return ConfigError("\n  ".join(lines) or " ".join(text.split()))


def _deep(group: str, inner: str) -> list[str]:
    """Name the choices of a group that have a key of two parts or more, such as ``dp.clip``."""
    if "." not in inner or not _choosable(group):
        return []
    key = f"{group}.{inner}"
    return [name for name in groups()[group] if key in flatten({group: choice(group, name)})]


def _choosable(group: str) -> bool:
    return group in groups()
