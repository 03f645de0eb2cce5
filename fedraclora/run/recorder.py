"""Write the files of a run in progress: ledger, merges, checkpoints, clients' metrics."""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedraclora.codec import split
from fedraclora.errors import CheckpointError
from fedraclora.privacy.secret import KEY_FILE as KEY
from fedraclora.protocol.method import Link, State
from fedraclora.run.client_state import ClientStore
from fedraclora.run.digests import check_fixed
from fedraclora.run.initial import CARRIED, ModelSource, checkpoint_base, is_small
from fedraclora.run.ledger import Ledger, number, read_ledger, seals
from fedraclora.tree import Tree, below, digest
from fedraclora.weights.chain import CatchUp, link_tensors, plan_meta, read_link
from fedraclora.weights.files import (
    ADVICE,
    CHECKPOINT,
    load_checkpoint,
    replacing,
    save_checkpoint,
)
from fedraclora.weights.links import (
    append_link,
    cut_links,
    link_digest,
    link_files,
    read_links,
    stored_digest,
)

CLIENTS_FILE = "clients.parquet"
Columns = Mapping[str, Any]  # columns by name, one value for each client


def together(parts: Sequence[Columns]) -> Columns:
    """Join the parts of the clients' table, one for each measurement.

    Columns are ``round``, ``client``, ``samples``, ``steps``, ``when`` (before or after local
    training), and one per metric; a metric that is missing in a part is NaN there.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    lacking = [np.full(len(part["round"]), np.nan) for part in parts]
    pairs = [*zip(parts, lacking, strict=True)]
    return {n: np.concatenate([part.get(n, none) for part, none in pairs]) for n in names}


def write_clients(folder: Path, parts: Sequence[Columns]) -> None:
    """Write the clients' table, if there is any."""
    if not parts:
        return
    from pyarrow import parquet, table

    with replacing(folder / CLIENTS_FILE) as path:
        parquet.write_table(table(together(parts)), path)


def read_clients(folder: Path) -> Columns:
    """Read the clients' table of a run folder; without columns if no client has measured.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = folder / CLIENTS_FILE
    if not path.is_file():
        return {}
    from pyarrow import ArrowException, parquet

    try:
        found = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {ADVICE}") from error
    return {name: found[name].to_numpy() for name in found.column_names}


# Further files of the run folder that a resumed run needs.
RESUMED_FROM = (str(KEY), "run_id")
PRESENT = ("config.yaml", "digests.json", CLIENTS_FILE)  # these have their own checksums, or grow
WEIGHTS = (
    "base/ is the whole trained model only for methods that merge all updates into it; for "
    "every method, use fedraclora.strategies.weights.load_weights(folder)"
)


@dataclass
class Stopwatch:
    """Measure the seconds of each part of a round.

    Attributes:
        seconds: Wall-clock seconds.
        cpu_seconds: CPU seconds of all threads of this process, which do not depend on the load of
            the machine. Work in other processes or on a GPU is not included.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start."""
        self._last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to part ``name``."""
        now = time.perf_counter(), time.process_time()
        for laps, end, start in zip((self.seconds, self.cpu_seconds), now, self._last, strict=True):
            laps[name] = laps.get(name, 0.0) + end - start
        self._last = now

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """Return both, as columns of a ledger."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


class RunRecorder:
    """Write the files of one run; without a folder, rows are kept in memory only.

    Args:
        folder: The run folder, or None.
        fixed: All settings that influence the result: the config, with ``auto`` resolved. They are
            stored in checkpoints; a resume with other values is refused, naming the keys.
        every: Rounds between checkpoints.
        sync: Flush to the disk with each row and merge.
        chain: Keep the merges.
        store: State of simulated clients, part of the run's checkpoint.
        free: Keys of ``fixed`` that may change in a resumed run.
        source: Where the initial weights are, if a package or the hub has them.

    Attributes:
        chain: The folder of the merges; None if they are not kept.
        incidents: Sentences for the next row: changed settings of a resumed run.
        by_clients: The clients' metrics of each measurement.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        fixed: Mapping[str, object] | None = None,
        every: int = 10,
        sync: bool = True,
        chain: bool = True,
        store: ClientStore | None = None,
        free: Iterable[str] = (),
        source: ModelSource | None = None,
    ) -> None:
        self.folder, self.fixed, self.every = folder, dict(fixed or {}), every
        self.sync, self.chain = sync, folder / "chain" if folder is not None and chain else None
        self.store = ClientStore() if store is None else store
        self.ledger = Ledger(None if folder is None else folder / "ledger.jsonl")
        self.free, self.source = tuple(f"{key}:" for key in free), source
        self._link, self._carried = "", Tree()
        self.incidents: list[str] = []
        self.by_clients: list[Columns] = []

    def begin(self, state: State) -> None:
        """Store the initial weights, from which the merges rebuild all later ones.

        Merges of an earlier attempt that was killed before its first checkpoint are removed.
        """
        if self.chain is not None:
            cut_links(self.chain, -1)
            meta: dict[str, object] = {"initial": True, "plan": plan_meta(state.plan)}
            base, elsewhere = (
                self.source.split_reference(state.base) if self.source else (state.base, {})
            )
            self.source = None  # it would keep the initial weights in memory for the whole run
            self._keep(self.chain, 0, state, dict(base), meta | elsewhere)

    def totals(self) -> tuple[int, int]:
        """Return the bytes up and down (with catch-up) over all rounds so far."""
        last: Mapping[str, Any] = self.ledger.rows[-1] if self.ledger.rows else {}
        return last.get("uplink_total", 0), last.get("downlink_total", 0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a ledger row, with the peak memory of this process."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {**row, "peak_memory_bytes": peak}
        if self.incidents:
            row["incidents"] = [*self.incidents, *row.get("incidents", ())]
            self.incidents = []
        self.ledger.append(row, sync=self.sync)

    def link(self, round_: int, state: State) -> None:
        """Write the merge of a round: its change of the base, and of the tensors beside it.

        Every round has one: without a change it is empty, so that a missing one is detected.
        """
        if self.chain is not None:
            self._keep(self.chain, round_, state, *link_tensors(state.link or Link()))

    def links(self) -> Iterator[tuple[int, Link]]:
        """Read back the merges after the last compacted ones, each with its round.

        Without kept merges there are none.
        """
        if self.chain is not None:
            folded = max((f.last for f in link_files(self.chain) if f.first < f.last), default=0)
            for number, tensors, meta in read_links(self.chain):
                if number > folded:  # 0 is the initial weights
                    yield number, read_link(tensors, meta)

    def _keep(
        self, chain: Path, round_: int, state: State, tensors: Tree, meta: dict[str, object]
    ) -> None:
        """Write a merge, with the method's tensors if they changed."""
        new = dict(state.carried)
        changed, removed = carried_change(self._carried, new)
        meta = meta | {"counters": state.counters.stored()} | removed
        path = append_link(
            chain, round_, tensors | changed, meta, previous=self._link, sync=self.sync
        )
        self._link, self._carried = stored_digest(path), new

    def is_spoilt(self, round_: int) -> bool:
        """Return whether the training loss of a round was above that of the first round."""
        losses = {row["round"]: number(row, "train_loss") for row in self.ledger.rows}
        return round_ > 0 and not losses.get(round_, math.nan) <= losses.get(1, math.nan)

    def due(self, round_: int) -> bool:
        """Return whether a checkpoint is due after this round."""
        return self.folder is not None and round_ % self.every == 0

    def save(self, state: State, round_: int, catch_up: CatchUp) -> None:
        """Write a checkpoint: the state for round ``round_ + 1``."""
        if self.folder is None:
            return
        write_clients(self.folder, self.by_clients)
        # Large weights that the merges contain are not written again.
        whole = is_small(state.base) or self.chain is None
        left = frozenset() if whole else catch_up.followed(0)
        base = {n: t for n, t in state.base.items() if n not in left}
        tensors, _ = split({"base": base, "carried": state.carried, "moments": state.moments})
        meta: dict[str, object] = {
            "round": round_,
            "counters": state.counters.stored(),
            "fixed": self.fixed,
            "plan": plan_meta(state.plan),
            "weights": WEIGHTS,
            "ledger": self.ledger.seal(round_),
            "chain": None if self.chain is None else self._link,
            "files": resume_digests(self.folder),
        }
        if left:  # otherwise the file's own checksum covers the base, too
            meta |= {"base_order": list(state.base), "base_digest": digest(state.base)}
        tensors |= catch_up.state() | self.store.state()
        save_checkpoint(self.folder / "checkpoint", tensors, meta)

    def restore(self, start: State, catch_up: CatchUp) -> tuple[State, int]:
        """Restore the checkpoint; ledger rows and merges after it are removed.

        Args:
            start: The state of round 0, for the plan and the device.
            catch_up: Receives the clients' versions.

        Returns:
            The state, and its round.

        Raises:
            CheckpointError: If there is none, it is damaged, or belongs to another configuration.
        """
        if self.folder is None:
            raise CheckpointError(
                "a run without a folder cannot be resumed. Run it with folder=..."
            )
        tensors, meta = load_checkpoint(self.folder / "checkpoint")
        check_fixed(self.folder, meta["fixed"], self.fixed, self.free)
        self.source = None  # a resumed run has already stored its initial weights
        counters = meta["counters"]
        if not isinstance(counters, dict):
            raise CheckpointError(
                f"{self.folder}: the counters of the checkpoint are "
                f"{counters!r}, which is not valid. Restore the checkpoint "
                "from a copy"
            )
        round_ = meta["round"]
        self._verify(self.folder, meta, round_)
        self.ledger.cut(round_)
        found = read_clients(self.folder)
        kept = {name: column[found["round"] <= round_] for name, column in found.items()}
        self.by_clients = [kept] if kept else []
        cut_links(self.folder / "chain", round_)
        catch_up.restore(tensors)
        self.store.restore(tensors)
        device = next(iter(start.base.values())).device
        base = checkpoint_base(below(tensors, "base/"), meta, self.folder)
        if digest(base) != meta.get("base_digest", digest(base)):
            self.incidents.append("weights were rebuilt from the chain, and round otherwise here")
        base = {n: t.to(device) for n, t in base.items()}
        carried, moments = below(tensors, "carried/"), below(tensors, "moments/")
        if self.chain is not None:
            self._link = link_digest(self.chain)
            self._carried = dict(carried)
        return State(
            base, start.plan, carried, type(start.counters).read(counters), moments=moments
        ), round_

    def _verify(self, folder: Path, meta: Mapping[str, Any], round_: int) -> None:
        """Check the files that a resume needs against the checkpoint's checksums, before any cut.

        Raises:
            CheckpointError: Naming the file that is damaged, missing or of another run.
        """
        path = folder / "ledger.jsonl"
        if round_ not in {row["round"] for row in self.ledger.rows[: round_ + 1]}:
            raise CheckpointError(
                f"{path} ends before round {round_}, the round of the checkpoint; {ADVICE}"
            )
        if meta["ledger"] != self.ledger.seal(round_):
            raise CheckpointError(
                f"{path} does not belong to the checkpoint of round {round_}; {ADVICE}"
            )
        if self.chain is not None and meta["chain"] is None:
            raise CheckpointError(
                f"{folder} has no chain, and a chain that begins at round {round_ + 1} has no "
                "initial weights. Resume with output.chain=false"
            )
        if self.chain is not None:
            hold_chain(folder, meta)
        found = resume_digests(folder)
        for name, recorded in meta["files"].items():
            if found.get(name) != recorded:
                raise CheckpointError(
                    f"{folder / name} is missing, or has changed since the checkpoint was "
                    f"written; {ADVICE}"
                )


def hold_chain(folder: Path, meta: Mapping[str, Any]) -> None:
    """Check that the checkpoint of a run folder belongs to its merges, if it has both.

    Raises:
        CheckpointError: If its merge is missing, or of another run.
    """
    chain, round_, known = folder / "chain", meta.get("round", 0), meta.get("chain")
    if isinstance(known, str) and link_digest(chain, round_) != known:
        raise CheckpointError(
            f"{chain / f'{round_:06d}.safetensors'} is missing, or belongs to another run "
            f"than {folder / 'checkpoint'}. Restore both folders from a copy"
        )


def hold_checkpoint(folder: Path, tensors: Tree, meta: Mapping[str, Any]) -> None:
    """Check that the contents of a checkpoint belong to a run's checkpoint, and to this run.

    Raises:
        CheckpointError: If it is another file, or of another run.
    """
    path, ledger = folder / "checkpoint" / CHECKPOINT, folder / "ledger.jsonl"
    if "base_order" not in meta and not below(tensors, "base/"):
        raise CheckpointError(f"{path} is another file of a run, not a checkpoint; {ADVICE}")
    if ledger.is_file() and meta["ledger"] not in seals(read_ledger(ledger)):
        raise CheckpointError(f"{path} belongs to another run than {ledger}; {ADVICE}")


def carried_change(old: Tree, new: Tree) -> tuple[Tree, dict[str, object]]:
    """Describe for a merge how the method's tensors changed.

    Returns:
        The changed tensors, and in metadata the names of removed ones.
    """
    changed = {n: t for n, t in new.items() if n not in old or not _same(old[n], t)}
    removed = [n for n in old if n not in new]
    return {f"{CARRIED}{n}": t for n, t in changed.items()}, {"gone": removed} if removed else {}


def _same(old: torch.Tensor, new: torch.Tensor) -> bool:
    return old is new or (old.dtype == new.dtype and torch.equal(old, new))


def resume_digests(folder: Path) -> dict[str, str]:
    """Compute the SHA-256 of each file in `RESUMED_FROM`, and of other files that a resume needs.

    The digest of a key of 32 random bytes does not reveal the key.
    """
    there = [name for name in RESUMED_FROM if (folder / name).is_file()]
    digests = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in there}
    return digests | {name: "present" for name in PRESENT if (folder / name).is_file()}


def checkpoint_meta(folder: Path) -> dict[str, Any]:
    """Read the metadata of a run folder's checkpoint; empty if there is none."""
    path = folder / "checkpoint"
    return dict(load_checkpoint(path)[1]) if (path / CHECKPOINT).is_file() else {}


def resolved_setting(folder: Path, key: str) -> Any:
    """Return the resolved value of a setting ``auto``; None without a checkpoint."""
    return checkpoint_meta(folder).get("fixed", {}).get("resolved", {}).get(key)
