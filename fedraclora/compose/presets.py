"""Check config files from elsewhere for code before they have any effect.

Files in the working folder are the user's own, except those that a tuning left there. Code named by
any other file runs only if it is trusted, and the file cannot read environment variables. No file
may set keys of Hydra itself, which creates objects from them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.core_plugins.importlib_resources_config_source import (
    ImportlibResourcesConfigSource,
)
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf

from fedraclora.compose import CONF
from fedraclora.errors import ConfigError
from fedraclora.trust import allow, every_name, refuse_unsaid

RESOLVER = re.compile(r"\$\{\s*[\w.]+:[^}]*\}")
OURS = ("hydra", "fedraclora.conf")  # packages whose files are not judged


def judge(file: Path | str, name: str, config: Any, package: str | None) -> None:
    """Reject a config file that would run code.

    Args:
        file: The file; its place in an installed package if it is a text.
        name: Its path below the searched folder.
        config: Its content, unresolved.
        package: The package of its header; None: the one of its path.

    Raises:
        ConfigError: If it sets keys of Hydra. Or if it lies outside of the working folder, and
            names code that is not trusted, or reads values from elsewhere.
    """
    held = OmegaConf.to_container(config, resolve=False)
    heads = [name, package or "", *(held if isinstance(held, dict) else ())]
    if any(re.match(r"/?hydra\b", str(head)) for head in heads):
        raise ConfigError(
            f"{file} sets keys of Hydra, which could run any code: give hydra.KEY=VALUE on the "
            "command line instead"
        )
    if isinstance(file, Path) and take_own(file):
        return
    refuse_unsaid(file, every_name("", held))
    if found := RESOLVER.search(str(held)):
        raise ConfigError(
            f"{file} has {found[0]}, which reads a value from outside the file, such as the "
            "environment. Copy the file into the working folder if you trust it."
        )


def take_own(file: Path) -> bool:
    """Trust the code that a file in the working folder names; return whether the file lies there.

    A folder of ``fedraclora tune`` is the record of a run, maybe of somebody else's.
    """
    found = file.resolve()
    own = found.is_relative_to(Path.cwd().resolve())
    if own := own and not any((above / "tune.db").exists() for above in found.parents[:2]):
        allow(file.read_text(encoding="utf-8"))
    return own


@contextmanager
def readable(file: object) -> Iterator[None]:
    """Convert errors inside to one that names the file: no YAML, or objects of Python.

    Raises:
        ConfigError: Naming it.
    """
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be read as a config: {why}. Write plain YAML") from error


class CheckedSource:
    """Check each file that a config source of Hydra reads."""

    path: str

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a file."""
        with readable(f"{self.path}/{config_path}"):
            found: ConfigResult = super().load_config(config_path)  # type: ignore[misc]
        if isinstance(self, FileConfigSource):
            place = Path(os.path.realpath(self.path)) / self._normalize_file_name(config_path)
            if not place.is_relative_to(CONF.resolve()):
                judge(place, config_path, found.config, found.header["package"])
        elif self.path.partition(".")[0] != "hydra":
            inside = f"{found.path}/{config_path}"
            judge(inside, config_path, found.config, found.header["package"])
        return found


def watch() -> None:
    """Make Hydra read files with sources that check them."""
    Plugins.instance()  # which registers Hydra's own, once
    types = SourcesRegistry.instance().types
    for kind in (FileConfigSource, ImportlibResourcesConfigSource):
        types[kind.scheme()] = type(kind.__name__, (CheckedSource, kind), {})


watch()
