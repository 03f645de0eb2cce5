"""Load files of an authors' repository as they are at a commit."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

from typing_extensions import override

from fedraclora.errors import ConfigError


class Unused(ModuleType):
    """A module that the loaded code imports, but the toy problem does not use."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # a package, so that modules of it can be imported

    @override
    def __getattr__(self, name: str) -> MagicMock | type[MagicMock]:
        """Stand in for anything that is imported from it, a base class among it."""
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (MagicMock,), {}) if name[0].isupper() else MagicMock(name=name)


@dataclass(frozen=True)
class Repository:
    """A clone of a repository, at a commit.

    Attributes:
        name: ``OWNER/NAME``.
        commit: As many digits of it as tell it apart.
        clone: Its folder, with or without a work tree.
    """

    name: str
    commit: str
    clone: Path

    def file(self, path: str) -> bytes:
        """Read a file of the commit.

        Raises:
            ConfigError: If the clone lacks the commit, or the commit the file.
        """
        words = ["git", "-C", str(self.clone), "show", f"{self.commit}:{path}"]
        shown = subprocess.run(words, capture_output=True, check=False)
        if shown.returncode:
            why = shown.stderr.decode(errors="replace").strip()
            raise ConfigError(f"{self.name} in {self.clone}: {why}")
        return shown.stdout

    @contextmanager
    def modules(
        self, *paths: str, unused: Sequence[str] = (), root: str = ""
    ) -> Iterator[list[ModuleType]]:
        """Import files of the commit, whose imports see nothing else of the repository.

        Args:
            paths: Of the files.
            unused: Modules in whose place stand empty ones.
            root: The folder from which the files import one another.

        Yields:
            The modules, in the order of the paths.
        """
        before = dict(sys.modules)
        places = [path.removeprefix(root).strip("/") for path in paths]
        names = [place.removesuffix(".py").replace("/", ".") for place in places]
        with tempfile.TemporaryDirectory() as folder:
            for path, place in zip(paths, places, strict=True):
                Path(folder, place).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, place).write_bytes(self.file(path))
            for name in unused:
                for end in range(1, name.count(".") + 2):
                    parts = name.split(".")[:end]
                    part, here = ".".join(parts), Path(folder, *parts).is_dir()
                    if part == name or (part not in sys.modules and not here):
                        sys.modules[part] = Unused(part)
            sys.path.insert(0, folder)
            try:
                for name in names:  # a stranger's of the same name
                    sys.modules.pop(name, None)
                importlib.invalidate_caches()
                yield [importlib.import_module(name) for name in names]
            finally:
                sys.path.remove(folder)
                tops = {name.split(".")[0] for name in (*names, *unused)}
                for name in [name for name in sys.modules if name.split(".")[0] in tops]:
                    del sys.modules[name]
                sys.modules.update({k: v for k, v in before.items() if k.split(".")[0] in tops})
