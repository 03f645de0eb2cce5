"""Checkpoints: what the next round needs, in one file that is either whole or not there.

A checkpoint is one safetensors file: tensors, and beside them in the file's header the meta data
as JSON, the order of the tensors and a SHA-256 of all of it. It is written under a temporary
name, flushed to the disk and renamed, so a process that is killed at any moment leaves the old
checkpoint or the new one. The chain is a folder of such files, one for each round's link; each
holds the digest of the one before, so that none can be missing or another run's. The links of
some rounds may have been folded into one file, which has the digest of the last of them, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedraclora.errors import CheckpointError
from fedraclora.narrow_weight import join, split
from fedraclora.tree import Tree

FILE = "checkpoint.safetensors"
_RESTORE_LINK = "restore the file from a copy: later weights need it"
_ABSENT = "(absent)"
_LINK = re.compile(r"(\d+)(?:-(\d+))?\.safetensors")


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; at the end the file written there takes its place.

    Args:
        path: The file to replace or to make; its folder is made where it is missing.
        sync: Flush file and folder to the disk, so that a power failure does no harm either.

    Yields:
        The temporary name. If the body raises, it is removed and ``path`` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with named(path):
            yield partial
            if sync:
                _flush(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if sync:
        with named(path):
            _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole text in one move."""
    with replacing(path) as partial:
        partial.write_text(text)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the file's name to an error of the system: that of a full disk does not."""
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
    """Write ``folder/checkpoint.safetensors`` in the place of the one before.

    Args:
        folder: The checkpoint folder of a run; made where it is missing.
        tensors: Any names, shapes, dtypes, devices and memory layouts.
        meta: JSON values (round, config digest, versions, ...). Tuples come back as lists.

    Raises:
        CheckpointError: If ``meta`` is not JSON.
    """
    save_tensors(folder / FILE, tensors, meta, sync=True)


def load_checkpoint(folder: Path) -> tuple[Tree, dict[str, Any]]:
    """Read what `save_checkpoint` wrote, and verify it.

    Returns:
        The tensors (on the CPU, in the order in which they were given), and the meta data.

    Raises:
        CheckpointError: If the file is missing, cut short or changed.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}: give resume the folder of a run that has one, "
            "or start anew without resume"
        )
    return load_tensors(path, "restore the file from a copy, or start the run anew without resume")


def has_checkpoint(folder: Path) -> bool:
    """Check whether a checkpoint folder holds one."""
    return (folder / FILE).is_file()


def append_link(
    folder: Path,
    round_: int,
    tensors: Tree,
    meta: dict[str, object],
    *,
    previous: str | None = None,
    sync: bool = True,
) -> Path:
    """Write the link of one round to the chain, for example ``chain/000012.safetensors``.

    Args:
        folder: The chain's folder.
        round_: The round that made the link; a link of that round that is there is replaced.
        tensors: The link's tensors.
        meta: JSON values; ``round`` is added.
        previous: Digest of the link before (`link_digest`), empty for the first; None: not kept.
        sync: Flush to the disk before returning.

    Returns:
        The file.
    """
    path = folder / f"{round_:06d}.safetensors"
    follows = {} if previous is None else {"previous": previous}
    save_tensors(path, tensors, {**meta, "round": round_, **follows}, sync=sync)
    return path


class LinkFile(NamedTuple):
    """A file of the chain: the link of one round, or what those of several were folded into.

    Attributes:
        first, last: The rounds that it leads through.
        path: Where it lies.
    """

    first: int
    last: int
    path: Path


def link_files(folder: Path) -> list[LinkFile]:
    """List the files of a chain in the order of their rounds.

    Links whose rounds another file has as well are left out: whoever folded them was killed before
    they were removed.
    """
    found: list[LinkFile] = []
    for file in sorted(_all_links(folder), key=lambda file: (-file.last, file.first)):
        if not found or file.last < found[-1].first:
            found.append(file)
    return found[::-1]


def fold_links(folder: Path, files: list[LinkFile], tensors: Tree, meta: dict[str, object]) -> None:
    """Write what leads through the rounds of several links in their place, and remove them.

    The new file comes in one move; as soon as it is there, nobody reads the others. What follows
    them follows it, since it has the digest of the last of them beside its own.

    Args:
        folder: The chain's folder.
        files: Of adjoining rounds, in order.
        tensors: Of the fold.
        meta: JSON values, with ``previous`` of the first of them; ``round``, ``first`` and the
            digest of the last of them are added.
    """
    first, last = files[0].first, files[-1].last
    meta = {**meta, "round": last, "first": first, "stands_for": stored_digest(files[-1].path)}
    path = folder / f"{first:06d}-{last:06d}.safetensors"
    save_tensors(path, tensors, meta, sync=True)
    remove_folded(folder)


def remove_folded(folder: Path) -> None:
    """Remove the links whose rounds are in another file of the chain as well."""
    for file in {*_all_links(folder)} - {*link_files(folder)}:
        file.path.unlink()


def read_links(folder: Path) -> Iterator[tuple[int, Tree, dict[str, Any]]]:
    """Read the chain, link by link, in ascending order of rounds.

    Yields:
        Round, tensors and meta data of each link; nothing where there is no folder. Of links that
        were folded the last round, with the first in the meta data.

    Raises:
        CheckpointError: If a link is damaged, missing, of another run, or renamed.
    """
    before: tuple[LinkFile, str] | None = None
    for file in link_files(folder):
        tensors, meta = load_tensors(file.path, _RESTORE_LINK)
        before = _follow(file, meta, before)
        yield file.last, tensors, meta


def link_digest(folder: Path, round_: int | None = None) -> str:
    """Return the digest of the last link up to a round, and check each against the one before.

    Headers alone are read: what is in the tensors is verified where they are.

    Args:
        folder: The chain's folder.
        round_: The last round that counts; None takes all.

    Returns:
        Empty where there is no link.

    Raises:
        CheckpointError: If a link is missing, of another run, or renamed, or has no header.
    """
    before: tuple[LinkFile, str] | None = None
    for file in link_files(folder):
        if round_ is None or file.last <= round_:
            header = _header(file.path, _RESTORE_LINK)
            before = _follow(file, json.loads(header["meta"]), before)
    return before[1] if before else ""


def stored_digest(path: Path) -> str:
    """Read the digest that a link's file says it has; a fold has that of its last link."""
    header = _header(path, _RESTORE_LINK)
    return str(json.loads(header["meta"]).get("stands_for", header["sha256"]))


def _follow(
    file: LinkFile, meta: Mapping[str, object], before: tuple[LinkFile, str] | None
) -> tuple[LinkFile, str]:
    """Check a link against the one before it; links of older releases do not say which it was."""
    path, round_ = file.path, meta.get("round")
    if (meta.get("first", round_), round_) != (file.first, file.last):
        raise CheckpointError(
            f"{path} has the link of round {round_}: the file has been renamed; give it "
            "its name back"
        )
    previous = meta.get("previous")
    if previous is not None and previous != (before[1] if before else ""):
        last = before[0].last if before else -1
        if file.first > last + 1:
            gone = path.with_name(f"{file.first - 1:06d}.safetensors")
            raise CheckpointError(f"{gone} is missing; {_RESTORE_LINK}")
        other = f" from {before[0].path.name}" if before else ""
        raise CheckpointError(
            f"{path} does not follow{other}: one of them is of another run; {_RESTORE_LINK}"
        )
    return file, stored_digest(path)


def cut_links(folder: Path, round_: int) -> None:
    """Remove the links of all rounds after ``round_``, the last one first."""
    for file in sorted(_all_links(folder), key=lambda file: file.last, reverse=True):
        if file.last > round_:
            file.path.unlink()


def _all_links(folder: Path) -> list[LinkFile]:
    named_so = ((_LINK.fullmatch(path.name), path) for path in folder.glob("*.safetensors"))
    return [LinkFile(int(m[1]), int(m[2] or m[1]), path) for m, path in named_so if m]


def save_tensors(path: Path, tensors: Tree, meta: Mapping[str, object], *, sync: bool) -> None:
    """Write tensors and JSON values to one file, in one move.

    Raises:
        CheckpointError: If ``meta`` is not JSON, or the file cannot be written.
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
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} cannot be written ({error}); make room there, or have its owner let you "
                "write, and go on with resume and the folder of the run"
            ) from error


def load_tensors(path: Path, advice: str) -> tuple[Tree, dict[str, Any]]:
    """Read what `save_tensors` wrote, and verify it.

    Args:
        path: The file.
        advice: What to do where it is damaged, for the message.

    Returns:
        The tensors (on the CPU, in the order in which they were given), and the meta data.

    Raises:
        CheckpointError: If the file is cut short or changed.
    """
    with whole(path, advice):
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            # safetensors sorts tensors by dtype; packing order is the order they came in. Cloned,
            # for they lie in the file's buffer, and matrix products round by alignment.
            names = json.loads(header["names"])
            tensors = {name: file.get_tensor(name).clone() for name in names}
            stored = set(file.keys())
        if stored != set(tensors) or _digest(tensors, header["meta"]) != header["sha256"]:
            raise CheckpointError(f"{path} is damaged: its digest does not fit; {advice}")
        return join(tensors), json.loads(header["meta"])


def _header(path: Path, advice: str) -> dict[str, str]:
    """Read what a file says of itself, without its tensors."""
    with whole(path, advice):
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata()
        json.loads(header["meta"])["round"], header["sha256"]
        return header


@contextmanager
def whole(path: Path, advice: str) -> Iterator[None]:
    """Say that a file is damaged, and what to do, where it cannot be read inside."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({error}); {advice}"
        ) from error


def _own(tensors: Tree) -> Tree:
    """Move tensors to the CPU, contiguous, each in memory of its own; copy only if needed."""
    own: Tree = {}
    taken: set[int] = set()
    for name, tensor in split(tensors).items():
        host = tensor.detach().cpu().contiguous()
        storage = host.untyped_storage()
        if storage.nbytes() != host.nbytes or storage.data_ptr() in taken:
            host = host.clone()
        taken.add(host.untyped_storage().data_ptr())
        own[name] = host
    return own


def _digest(tensors: Tree, meta: str) -> str:
    """SHA-256 over meta data, names, dtypes, shapes and bytes, in order; any dtype."""
    h = hashlib.sha256(meta.encode())
    for name, tensor in tensors.items():
        h.update(f"\0{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # Raw bytes: numpy knows neither bfloat16 nor 8-bit floats; its empty arrays have none.
        if tensor.numel():
            h.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def difference(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """List how two nested configs differ, one line per key.

    Example:
        >>> difference({"method": {"rank": 4}, "seed": 0}, {"method": {"rank": 8}})
        ['method.rank: 4 -> 8', 'seed: 0 -> (absent)']
    """
    left, right = flatten(old), flatten(new)
    lines = []
    for key in sorted({*left, *right}):
        texts = [_canonical(side[key]) if key in side else _ABSENT for side in (left, right)]
        if texts[0] != texts[1]:
            lines.append(f"{key}: {texts[0]} -> {texts[1]}")
    return lines


def flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Write a nested config as dotted keys; lists and empty mappings are values.

    Example:
        >>> flatten({"method": {"name": "fedavg"}, "seed": 0})
        {'method.name': 'fedavg', 'seed': 0}
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
