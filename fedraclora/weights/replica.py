"""Copy base weights to other processes, in memory or on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from typing_extensions import override

from fedraclora.errors import CheckpointError, WireError
from fedraclora.protocol.link import Plan, apply_link
from fedraclora.tree import Tree, fingerprint
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.weights.update import BaseWeights, WeightUpdate

log = logging.getLogger(__name__)


class Replica(BaseWeights):
    """Follow the weights of a `fedraclora.weights.update.WeightHistory`.

    Args:
        plan: Of the run: how links are folded in.
        device: Where the weights are kept.

    Attributes:
        mark: Fingerprint of the weights; None if no update brought them.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__({}, -1)
        self.plan, self.device = plan, device
        self.mark: int | None = None

    def follow(self, update: WeightUpdate) -> bool:
        """Apply an update; False if all weights are needed whole.

        Raises:
            WireError: If whole weights do not match their fingerprint.
        """
        if (update.version, update.mark) == (self.version, self.mark):
            return True
        if update.start is not None and not update.start <= self.version <= update.version:
            return False
        base = {} if update.start is None else self.base
        for version, link in update.links:
            if version > self.version:
                base = apply_link(base, link, self.plan)
        base = base | {n: t.to(self.device) for n, t in update.dense.items()}
        if fingerprint(base) != update.mark:
            if update.start is not None:  # another processor may round a product differently
                return False
            raise WireError(f"version {update.version} of the base weights was damaged on its way")
        self.take(base, update.version, update.mark)
        return True

    def take(self, base: Tree, version: int, mark: int | None) -> None:
        """Store these weights."""
        self.base, self.version, self.mark = base, version, mark


class StoredReplica(Replica):
    """Store a client's base weights on disk; only the newest version, replaced atomically.

    Weights that changed since the last full write are in a second file, as long as they are the
    smaller part: so a round writes only what it changed.

    Args:
        folder: The folder of the files, created at the first write.
        plan: The plan of the run.
        device: Where the weights are kept.
    """

    def __init__(self, folder: Path, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self.folder = folder
        # the mark of the fully written weights, and the later ones
        self._whole, self._changed = "", set[str]()
        if (found := _read(folder)) is not None:
            base, version, mark, self._whole, self._changed = found
            super().take({n: t.to(device) for n, t in base.items()}, version, mark)

    def begin(self, base: Mapping[str, torch.Tensor]) -> None:
        """Store the model's initial weights as version 0, if nothing is stored."""
        if self.version < 0:
            super().take({n: t.detach().clone() for n, t in base.items()}, 0, None)

    @override
    def take(self, base: Tree, version: int, mark: int | None) -> None:
        meta = {"version": version, "mark": str(mark)}
        changed = self._changed | {n for n, t in base.items() if self.base.get(n) is not t}
        part, rest = ({n: t for n, t in base.items() if (n in changed) is k} for k in (True, False))
        few = sum(t.nbytes for t in part.values()) < sum(t.nbytes for t in rest.values())
        if self._whole and few and base.keys() == self.base.keys():
            save_tensors(changed_file(self.folder), part, meta | {"of": self._whole}, sync=True)
            self._changed = changed
        else:
            save_tensors(replica_file(self.folder), base, meta, sync=True)
            self._whole, self._changed = f"{version} {mark}", set()
        super().take(base, version, mark)


def replica_file(folder: Path) -> Path:
    """Return the file of the base weights in a folder."""
    return folder / "weights.safetensors"


def changed_file(folder: Path) -> Path:
    """Return the file of the newer weights in a folder."""
    return folder / "changed.safetensors"


def read_stored_replica(folder: Path) -> tuple[Tree, int, int] | None:
    """Read and verify weights, version and checksum from a folder; None if there are none.

    Damaged files count as none: the client reports it, and receives every weight.
    """
    found = _read(folder)
    return None if found is None else found[:3]


def _read(folder: Path) -> tuple[Tree, int, int, str, set[str]] | None:
    """Read the same, with the facts that `StoredReplica` keeps about the files."""
    path, later = replica_file(folder), changed_file(folder)
    try:
        if not path.is_file():
            return None
        base, meta = load_tensors(path, "it is sent anew")
        whole, part = f"{meta['version']} {meta['mark']}", Tree()
        if later.is_file():
            path = later
            changed, newer = load_tensors(path, "it is sent anew")
            # otherwise the process was killed before it wrote the next ones
            if newer["of"] == whole:
                part, meta = changed, newer
        version, mark = int(str(meta["version"])), int(str(meta["mark"]))
        return base | part, version, mark, whole, set(part)
    except (CheckpointError, KeyError, ValueError) as error:
        log.warning("%s", error)
        path.unlink(missing_ok=True)
        return None
