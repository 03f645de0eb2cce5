"""Check config files of others for code before they have any effect.

Those in the working folder are the user's own, but for what a tuning has left there. Of others the
code that they name runs only if it is trusted, and their values do not reach the environment. None
sets keys of Hydra itself, which makes objects of what stands there.
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
        file: The file; as text, its place in an installed package.
        name: Its path below the folder that is searched.
        config: What it holds, nothing resolved.
        package: Where its header puts it in the config; None: by its path.

    Raises:
        ConfigError: If it sets keys of Hydra; or if it does not lie in the working folder, and
            names code that is not trusted, or takes values from elsewhere.
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
    """Take what a file names for the user's own where it lies in the working folder; tell if so.

    What lies in a folder of ``fedraclora tune`` is the record of a run, whosesoever it was.
    """
    found = file.resolve()
    own = found.is_relative_to(Path.cwd().resolve())
    if own := own and not any((above / "tune.db").exists() for above in found.parents[:2]):
        allow(file.read_text(encoding="utf-8"))
    return own


@contextmanager
def readable(file: object) -> Iterator[None]:
    """Say of a file that is read inside that it is no YAML, or asks for objects of Python.

    Raises:
        ConfigError: Naming it.
    """
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{file} cannot be read as a config: {why}. Write plain YAML") from error


class Judging:
    """Of sources of Hydra's: judges what is read there."""

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
    """Have Hydra read files by sources that judge them."""
    Plugins.instance()  # which registers Hydra's own, once
    types = SourcesRegistry.instance().types
    for kind in (FileConfigSource, ImportlibResourcesConfigSource):
        types[kind.scheme()] = type(kind.__name__, (Judging, kind), {})


watch()
