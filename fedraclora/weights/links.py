"""Write merge files: a folder with one file for each round that changed the base.

Each contains the checksum of the previous one, so that a missing file, or one of another run, is
detected. The merges of some rounds may be compacted into one file, which also has the checksum of
the last of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedraclora.errors import CheckpointError
from fedraclora.tree import Tree
from fedraclora.weights.files import load_tensors, read_header, save_tensors

_RESTORE_LINK = "restore the file from a copy: later weights need it"
_LINK = re.compile(r"(\d+)(?:-(\d+))?\.safetensors")


def append_link(
    folder: Path,
    round_: int,
    tensors: Tree,
    meta: dict[str, object],
    *,
    previous: str,
    sync: bool = True,
) -> Path:
    """Write the merge of one round, for example to ``chain/000012.safetensors``.

    Args:
        folder: The chain's folder.
        round_: The round of the merge; an existing merge of that round is replaced.
        tensors: The merge's tensors.
        meta: JSON values; ``round`` is added.
        previous: Checksum of the previous merge (`link_digest`), empty for the first.
        sync: Flush to the disk before returning.

    Returns:
        The file.
    """
    path = folder / f"{round_:06d}.safetensors"
    save_tensors(path, tensors, {**meta, "round": round_, "previous": previous}, sync=sync)
    return path


class LinkFile(NamedTuple):
    """Describe a merge file: of one round, or of several compacted rounds.

    Attributes:
        first, last: The rounds that it contains.
        path: Its path.
    """

    first: int
    last: int
    path: Path


def link_files(folder: Path) -> list[LinkFile]:
    """Return the merge files in the order of their rounds.

    Merges whose rounds a compacted file contains are left out: the process that compacted them was
    killed before it removed them.
    """
    found: list[LinkFile] = []
    for file in sorted(_all_links(folder), key=lambda file: (-file.last, file.first)):
        if not found or file.last < found[-1].first:
            found.append(file)
    return found[::-1]


def fold_links(folder: Path, files: list[LinkFile], tensors: Tree, meta: dict[str, object]) -> None:
    """Compact the merges of several rounds into one file, and remove theirs.

    The new file appears atomically; from then on the others are not read. The next merge also
    follows the new file, since that has the checksum of the last of them beside its own.

    Args:
        folder: The chain's folder.
        files: Files of consecutive rounds, in order.
        tensors: Tensors of the compacted merge.
        meta: JSON values, with ``previous`` of the first of them; ``round``, ``first`` and the
            checksum of the last of them are added.
    """
    first, last = files[0].first, files[-1].last
    meta = {**meta, "round": last, "first": first, "stands_for": stored_digest(files[-1].path)}
    path = folder / f"{first:06d}-{last:06d}.safetensors"
    save_tensors(path, tensors, meta, sync=True)
    remove_folded(folder)


def remove_folded(folder: Path) -> None:
    """Remove merges whose rounds a compacted file contains."""
    for file in {*_all_links(folder)} - {*link_files(folder)}:
        file.path.unlink()


def read_links(folder: Path) -> Iterator[tuple[int, Tree, dict[str, Any]]]:
    """Read the merges in ascending order of rounds.

    Yields:
        Round, tensors and metadata of each merge; nothing without a folder. For compacted merges
        the last round, with the first one in the metadata.

    Raises:
        CheckpointError: If a merge file is damaged, missing, renamed, or of another run.
    """
    before: tuple[LinkFile, str] | None = None
    for file in link_files(folder):
        tensors, meta = load_tensors(file.path, _RESTORE_LINK)
        before = _follow(file, meta, before)
        yield file.last, tensors, meta


def link_digest(folder: Path, round_: int | None = None) -> str:
    """Return the checksum of the last merge up to a round; each is checked against the one before.

    Only headers are read: tensors are verified when they are read.

    Args:
        folder: The chain's folder.
        round_: The last round to include; None: all.

    Returns:
        The checksum; empty without merges.

    Raises:
        CheckpointError: If a merge file is missing, of another run, renamed, or has no header.
    """
    before: tuple[LinkFile, str] | None = None
    for file in link_files(folder):
        if round_ is None or file.last <= round_:
            header = read_header(file.path, _RESTORE_LINK)
            before = _follow(file, json.loads(header["meta"]), before)
    return before[1] if before else ""


def stored_digest(path: Path) -> str:
    """Read the checksum that a merge file records; a compacted file has that of its last merge."""
    header = read_header(path, _RESTORE_LINK)
    return str(json.loads(header["meta"]).get("stands_for", header["sha256"]))


def _follow(
    file: LinkFile, meta: Mapping[str, object], before: tuple[LinkFile, str] | None
) -> tuple[LinkFile, str]:
    """Check a merge against the one before it."""
    path, round_ = file.path, meta.get("round")
    if (meta.get("first", round_), round_) != (file.first, file.last):
        raise CheckpointError(
            f"{path} has the link of round {round_}: the file has been renamed; give it "
            "its name back"
        )
    if meta.get("previous") != (before[1] if before else ""):
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
    """Remove the merges of all rounds after ``round_``, the last one first."""
    for file in sorted(_all_links(folder), key=lambda file: file.last, reverse=True):
        if file.last > round_:
            file.path.unlink()


def _all_links(folder: Path) -> list[LinkFile]:
    named_so = ((_LINK.fullmatch(path.name), path) for path in folder.glob("*.safetensors"))
    return [LinkFile(int(m[1]), int(m[2] or m[1]), path) for m, path in named_so if m]
