"""Send the code of a run to the hosts of a Ray cluster as packages, without a shared path.

One package contains this project, as this process runs it; one more for each folder from which the
user's modules were imported. Ray keeps them at the cluster's head, named by their content, and
unpacks each once per host, at the front of the workers' path.
"""

from __future__ import annotations

import hashlib
import io
import logging
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray._private.runtime_env.packaging import (
    _dir_travel,
    _get_excludes,
    package_exists,
    pin_runtime_env_uri,
    upload_package_to_gcs,
)

from fedraclora.errors import ConfigError

PROJECT = "fedraclora"
# Like a .rayignore file: names that begin with a dot: .git, .venv, caches.
LEFT_OUT = (".?*", "__pycache__", "node_modules", "venv", f"/{PROJECT}", "/experiments/results")
OUTPUTS = ("data", "runs", "multirun", "outputs", "wandb", "mlruns")
LARGEST = 64 * 2**20  # most bytes of the files of a folder
EARLIEST = (1980, 1, 1, 0, 0, 0)  # fixed time stamps, so that the same files give the same package
QUIET = logging.getLogger(f"{__name__}.files")
QUIET.disabled = True


class CodePackages:
    """Package the code of this process for workers on other hosts.

    Attributes:
        facts: What is sent, for a reader.

    Raises:
        ConfigError: If a folder is too large to be sent.
    """

    def __init__(self) -> None:
        folders = {Path(sys.modules[PROJECT].__file__ or "").parent: PROJECT} | _user_folders()
        self._content: dict[str, bytes] = {}
        parts = []
        for folder, why in folders.items():
            content = _packed(folder, why)
            name = hashlib.sha256(content).hexdigest()[:40]
            self._content[f"gcs://_ray_pkg_{name}.zip"] = content
            parts.append(f"{folder if why != PROJECT else why} ({len(content) / 1e6:.2f} MB)")
        self.facts = ", ".join(parts)

    def uris(self) -> list[str]:
        """Upload missing packages, and return the names of all; this job's own come last.

        Ray deletes a package some minutes after its upload unless it is requested again.
        """
        for uri, content in self._content.items():
            pin_runtime_env_uri(uri)
            if not package_exists(uri):
                upload_package_to_gcs(uri, content)
        return [*self._content, *ray.get_runtime_context().runtime_env.get("py_modules", [])]


def loaded_code() -> dict[str, tuple[str, str]]:
    """List the project's and the user's modules that this process runs: digest and file of each."""
    files = {name: module.__file__ or "" for name, module in _modules()}
    return {n: (hashlib.sha256(Path(f).read_bytes()).hexdigest(), f) for n, f in files.items()}


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """List imported modules that are not Python's or installed, and always the project's."""
    theirs = (sys.prefix, sys.base_prefix)
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None) or ""
        if not file.endswith(".py") or not Path(file).is_absolute() or name.startswith("__"):
            continue
        installed = file.startswith(theirs) or "site-packages" in file
        if name.partition(".")[0] == PROJECT or not installed:
            yield name, module


def _user_folders() -> dict[Path, str]:
    """Find the folders on the path with the user's imported modules, with one of these each."""
    found: dict[Path, str] = {}
    for name, module in _modules():
        if not name.startswith(PROJECT) and (file := module.__file__):
            depth = name.count(".") + (Path(file).name == "__init__.py")
            found.setdefault(Path(file).absolute().parents[depth], name.partition(".")[0])
    return found


def _packed(folder: Path, why: str) -> bytes:
    """Package a folder, without the files in its .gitignore and .rayignore."""
    ours = why == PROJECT
    top = folder.parent if ours else folder
    out = [pattern for pattern in LEFT_OUT if not (ours and PROJECT in pattern)]
    out += [f"/{n}/" for n in OUTPUTS if not ours and not (folder / n / "__init__.py").is_file()]
    files: list[Path] = []
    total = 0

    def take(path: Path) -> None:
        nonlocal total
        if path.is_file():
            files.append(path)
            total += path.stat().st_size
        if total > LARGEST:
            raise ConfigError(
                f"the module {why} is imported from {folder}, which is larger than "
                f"{LARGEST >> 20} MB and would be sent to every host of the Ray cluster. List "
                f"files that are not code in {folder / '.rayignore'} (as in .gitignore), or "
                "move the modules into their own folder"
            )

    ignored: list[Any] = [_get_excludes(folder, out)]
    _dir_travel(folder, ignored, take, include_gitignore=True, logger=QUIET)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as package:
        for path in sorted(files):
            entry = zipfile.ZipInfo(path.relative_to(top).as_posix(), EARLIEST)
            entry.external_attr = 0o644 << 16
            package.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return written.getvalue()
