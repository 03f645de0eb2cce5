"""Hydra in `make test`: what it reads and merges of our own configs is remembered.

Thousands of tests compose a config, from thirty files each: 0.09 s of a processor, 0.02 s where
Hydra remembers files and lists, nothing where the same words were composed before. Nothing is
remembered where a test has a folder of its own on Hydra's search path, in tests of composing itself
(the fixture ``users_hydra``), in other processes, and in `make test-all`.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from dataclasses import replace

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig

from fedraclora.binding import Plain, PlainDict
from fedraclora.compose import overrides as overriding
from fedraclora.compose.choices import CONF  # which puts into Hydra's store what code has

Key = tuple[object, ...]

load_config = ConfigRepository.load_config
create_defaults_list = config_loader_impl.create_defaults_list
compose_defaults = ConfigLoaderImpl._compose_config_from_defaults_list
get_mode = Hydra.get_mode
interpolation_map = defaults_list._create_interpolation_map
compose_once = overriding.compose_once

# Pickled: a copy takes a quarter of the time that `copy.deepcopy` does.
files: dict[Key, bytes] = {}  # what a file holds
lists: dict[Key, DefaultsList] = {}  # the files that some choices lead to
merged: dict[int, tuple[list[ResultDefault], bytes]] = {}  # those files as one, by the id of a list
plain: dict[Key, bytes] = {}  # whole configs, by all that is asked for


def ours(sources: Sequence[ConfigSource]) -> Key | None:
    """Name the places that are searched; None where a test has its own among them."""
    if [source.path for source in sources if source.scheme() == "file"] != [str(CONF)]:
        return None
    return tuple(source.full_path() for source in sources)


def file_once(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    """Read a file once in a process."""
    if (places := ours(self.get_sources())) is None:
        return load_config(self, config_path)
    key = (*places, config_path)
    if key not in files:
        files[key] = pickle.dumps(load_config(self, config_path))
    found: ConfigResult | None = pickle.loads(files[key])
    return found


def list_once(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    """List the files that choices lead to once; keys that are set beside them change nothing."""
    if (places := ours(repo.get_sources())) is None:
        return create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    keys = Overrides(repo, overrides_list).config_overrides
    choices = [override for override in overrides_list if override not in keys]
    words = tuple(choice.input_line for choice in choices)
    key = (*places, config_name, words, prepend_hydra, skip_missing)
    if key not in lists:
        lists[key] = create_defaults_list(repo, config_name, choices, prepend_hydra, skip_missing)
    return replace(lists[key], config_overrides=keys)


def merged_once(
    self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository
) -> DictConfig:
    """Merge the files of a list that is remembered once."""
    if ours(repo.get_sources()) is None:
        return compose_defaults(self, defaults, repo)
    if id(defaults) not in merged:  # which nothing else has while the list is kept
        merged[id(defaults)] = defaults, pickle.dumps(compose_defaults(self, defaults, repo))
    found: DictConfig = pickle.loads(merged[id(defaults)][1])
    return found


def mode_of(self: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """Tell ``hydra.mode``, for which Hydra composes all once more; no file of ours sets it."""
    places = [source.path for source in self.config_loader.get_sources()]
    theirs = {path for path in places if path.startswith("/")} - {str(CONF)}
    if theirs or any("hydra." in word for word in overrides):
        mode: RunMode | None = get_mode(self, config_name, overrides)
        return mode
    return None


def map_where_read(
    overrides: Overrides, defaults: list[InputDefault], self_added: bool
) -> DictConfig | None:
    """Map the choices for ``${...}`` in a list of defaults, where one is read: it is slow."""
    if not any(entry.is_interpolation() for entry in defaults):
        return None
    return interpolation_map(overrides, defaults, self_added)


def whole_once(words: Sequence[str], values: Plain) -> PlainDict:
    """Compose the same words and values once."""
    config_loader = GlobalHydra.instance().config_loader()
    places = ours(config_loader.get_sources())
    if places is None or any("hydra." in word for word in words):
        return compose_once(words, values)
    # Files name this variable; text tells 1 from 1.0 and from True, which are equal.
    key = (*places, os.environ.get("FEDRACLORA_DATA"), *words, repr([*values.items()]))
    if key not in plain:
        plain[key] = pickle.dumps(compose_once(words, values))
    found: PlainDict = pickle.loads(plain[key])
    return found


# Of Hydra, and of ours around it: owner, name, what stands there in tests, what stood there.
REPLACED: list[tuple[object, str, object, object]] = [
    (ConfigRepository, "load_config", file_once, load_config),
    (config_loader_impl, "create_defaults_list", list_once, create_defaults_list),
    (ConfigLoaderImpl, "_compose_config_from_defaults_list", merged_once, compose_defaults),
    (Hydra, "get_mode", mode_of, get_mode),
    (defaults_list, "_create_interpolation_map", map_where_read, interpolation_map),
    (overriding, "compose_once", whole_once, compose_once),
]


def install() -> None:
    """Have Hydra remember, in this process."""
    for owner, name, here, _ in REPLACED:
        setattr(owner, name, here)
