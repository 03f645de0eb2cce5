"""Write checkpoints: the state for the next round in one file, replaced atomically.

A checkpoint is one safetensors file: tensors, and in the file's header the metadata as JSON, the
order of the tensors and a SHA-256 of all of it. It is written under a temporary name, flushed to
the disk and renamed, so a process that is killed at any moment leaves the old checkpoint or the new
one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.narrow_weight import in_parts, rejoined
from fedraclora.tree import Tree

CHECKPOINT = "checkpoint.safetensors"
ADVICE = "restore the file from a copy, or start the run anew without resume"
_ABSENT = "(absent)"


def is_private(folder: Path) -> bool:
    """Return whether only its owner may enter or read a folder."""
    return not folder.stat().st_mode & 0o077


def make_folder(folder: Path, *, private: bool | None = None) -> None:
    """Create a folder and its parents, if missing.

    Args:
        folder: The folder.
        private: Whether only its owner may enter it; None: as for its parent.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    private = is_private(folder.parent) if private is None else private
    folder.mkdir(mode=0o700 if private else 0o777, exist_ok=True)


def keep_private(path: Path) -> None:
    """Restrict access to a file in a private folder, also after it is copied."""
    if is_private(path.parent):
        path.chmod(0o600)


def refuse_links(folder: Path) -> None:
    """Reject a run folder with a symbolic link that leads out of it.

    The folder may come from others, and writing through a link would overwrite files of this user.
    Links within the folder, as wandb creates them, are harmless.

    Raises:
        ConfigError: Naming the link.
    """
    home = folder.resolve()
    for place, folders, files in os.walk(folder):
        for link in (Path(place, name) for name in (*folders, *files)):
            if link.is_symlink() and not Path(os.path.realpath(link)).is_relative_to(home):
                raise ConfigError(
                    f"{link} is a symbolic link out of its run folder, and what is written there "
                    "would change other files; remove it, or put a copy of what it leads to in "
                    "its place"
                )


def open_lock(path: Path) -> IO[bytes]:
    """Open a lock file, only for users who may write into its folder.

    Every user who can read a file can lock it.
    """
    writable = path.parent.stat().st_mode & 0o022
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with suppress(PermissionError):  # it belongs to another user
        os.fchmod(handle, 0o600 | writable | writable << 1)
    return os.fdopen(handle, "r+b")


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` at the end.

    Args:
        path: The file to replace or create; its folder is created if missing.
        sync: Flush file and folder to the disk, to survive a power failure.

    Yields:
        The temporary name. If the body raises, it is removed and ``path`` stays as it was.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming_file(path):
            partial.touch()
            # safetensors would make it readable only by its owner
            mode = partial.stat().st_mode & 0o777
            yield partial
            partial.chmod(mode)
            keep_private(partial)
            if sync:
                _flush(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if sync:
        with naming_file(path):
            _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text)


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Add the file's name to an operating system error; a full disk does not report it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only POSIX systems open a folder to flush its entries
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(folder: Path, tensors: Tree, meta: dict[str, object]) -> None:
    """Replace ``folder/checkpoint.safetensors`` atomically.

    Args:
        folder: The checkpoint folder of a run; created if missing.
        tensors: Tensors of any names, shapes, dtypes, devices and memory layouts.
        meta: JSON values (round, config digest, versions, ...). Tuples are read back as lists.

    Raises:
        CheckpointError: If ``meta`` is not JSON.
    """
    save_tensors(folder / CHECKPOINT, tensors, meta, sync=True)


def load_checkpoint(folder: Path) -> tuple[Tree, dict[str, Any]]:
    """Read and verify a checkpoint of `save_checkpoint`.

    Returns:
        The tensors (on the CPU, in the order in which they were given), and the meta data.

    Raises:
        CheckpointError: If the file is missing, cut short or changed.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}: name the folder of a run that has one, or start "
            "anew without resume. A run of `deploy connection=` has it on the SuperLink's host, in "
            f"engine.folder: by default ~/fedraclora/{path.absolute().parent.parent.name} "
            "of the SuperLink's user"
        )
    return load_tensors(path, ADVICE)


def save_tensors(path: Path, tensors: Tree, meta: Mapping[str, object], *, sync: bool) -> None:
    """Write tensors and JSON values to one file atomically.

    Raises:
        CheckpointError: If ``meta`` is not JSON.
        OSError: If the file cannot be written.
    """
    try:
        text = json.dumps(meta)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the meta data of {path} must be JSON values: {error}") from error
    own = _own(tensors)
    header = {"meta": text, "names": json.dumps(list(own)), "sha256": _digest(own, text)}
    with replacing(path, sync=sync) as partial:
        try:
            save_file(own, partial, metadata=header)
            _order_header(partial)
        except SafetensorError as error:
            if (found := re.search(r"os error (\d+)", str(error))) is None:
                raise CheckpointError(f"{path} cannot be written: {error}") from error
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from error


def _order_header(path: Path) -> None:
    """Sort the header of a file, keeping its length: safetensors writes it in any order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        if len(found := text.encode().ljust(size)) == size:
            file.seek(8)
            file.write(found)


def load_tensors(path: Path, advice: str) -> tuple[Tree, dict[str, Any]]:
    """Read and verify a file of `save_tensors`.

    Args:
        path: The file.
        advice: What to do if it is damaged, for the message.

    Returns:
        The tensors (on the CPU, in the order in which they were given), and the meta data.

    Raises:
        CheckpointError: If the file is cut short or changed.
    """
    with reading_whole(path, advice):
        # Twice: safetensors reads header and data separately, and a file may be replaced in
        # between.
        for _ in range(2):
            header, tensors, fits = _read(path)
            if fits:
                return rejoined(tensors), json.loads(header["meta"])
    raise CheckpointError(f"{path} is damaged: its digest does not fit; {advice}")


def _read(path: Path) -> tuple[dict[str, str], Tree, bool]:
    """Read header and tensors, and whether the checksum matches."""
    with safe_open(path, framework="pt") as file:
        header: dict[str, str] = file.metadata()
        # safetensors sorts tensors by dtype; packing order is the original order. Cloned, since
        # they share the file's buffer, and matrix products round by alignment.
        names = json.loads(header["names"])
        tensors = {name: file.get_tensor(name).clone() for name in names}
        stored = set(file.keys())
    fits = stored == set(tensors) and _digest(tensors, header["meta"]) == header["sha256"]
    return header, tensors, fits


def read_header(path: Path, advice: str) -> dict[str, str]:
    """Read a file's metadata without its tensors."""
    with reading_whole(path, advice):
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata()
        json.loads(header["meta"])["round"], header["sha256"]
        return header


@contextmanager
def reading_whole(path: Path, advice: str) -> Iterator[None]:
    """Report an error while a file is read as damage, with advice."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({error}); {advice}"
        ) from error


def _own(tensors: Tree) -> Tree:
    """Move tensors to the CPU, contiguous, each in its own memory; copy only if needed."""
    own: Tree = {}
    taken: set[int] = set()
    for name, tensor in in_parts(tensors).items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage()
        if storage.nbytes() != host.nbytes or storage.data_ptr() in taken:
            host = host.clone()
        taken.add(host.untyped_storage().data_ptr())
        own[name] = host
    return own


def _digest(tensors: Tree, meta: str) -> str:
    """Compute SHA-256 over metadata, names, dtypes, shapes and bytes, in order; any dtype."""
    h = hashlib.sha256(meta.encode())
    for name, tensor in tensors.items():
        h.update(f"\0{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # Raw bytes: numpy has neither bfloat16 nor 8-bit floats; its empty arrays have none.
        if tensor.numel():
            h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def config_difference(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """List how two nested configs differ, one line per key.

    Example:
        >>> config_difference({"method": {"rank": 4}, "seed": 0}, {"method": {"rank": 8}})
        ['method.rank: 4 -> 8', 'seed: 0 -> (absent)']
    """
    left, right = (
        {key: _canonical(value) for key, value in flatten(side).items()} for side in (old, new)
    )
    pairs = {key: (left.get(key, _ABSENT), right.get(key, _ABSENT)) for key in left | right}
    return [f"{key}: {was} -> {now}" for key, (was, now) in sorted(pairs.items()) if was != now]


def flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten a nested config to dotted keys; lists and empty mappings are values.

    Example:
        >>> flatten({"local": {"lr": 0.1}, "seed": 0})
        {'local.lr': 0.1, 'seed': 0}
    """
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
