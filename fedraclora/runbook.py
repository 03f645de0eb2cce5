"""What a run writes while it runs: ledger rows, links of the chain, checkpoints."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedraclora.chain import CatchUp, link_tensors, read_link, replay
from fedraclora.checkpoint import (
    append_link,
    cut_links,
    difference,
    load_checkpoint,
    read_links,
    save_checkpoint,
)
from fedraclora.clientstore import ClientStore
from fedraclora.errors import CheckpointError
from fedraclora.ledger import Ledger
from fedraclora.method import Link, Plan, State
from fedraclora.tree import Tree, digest


@dataclass
class Stopwatch:
    """Seconds of the stations of a round.

    Attributes:
        seconds: By the wall.
        cpu_seconds: Of this process on its processors, all threads together: what a station costs
            on a busy machine, too. What clients do in other processes or on a GPU is not in it.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Start."""
        self._last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to station ``name``."""
        now = time.perf_counter(), time.process_time()
        for laps, end, start in zip((self.seconds, self.cpu_seconds), now, self._last, strict=True):
            laps[name] = laps.get(name, 0.0) + end - start
        self._last = now

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """Both, as columns of a ledger."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


class RunBook:
    """The files of one run; without a folder, rows are kept in memory only.

    Args:
        folder: The run folder, or None.
        fixed: All that decides the bits of the run: the config, and what ``auto`` was resolved to.
            Stored in checkpoints; a resume under other values is refused, key by key.
        every: Rounds between checkpoints.
        sync: Flush to the disk with each row and link.
        chain: Keep the links.
        store: What stays at simulated clients, part of the run's checkpoint.
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
    ) -> None:
        self.folder, self.fixed, self.every = folder, dict(fixed or {}), every
        self.sync, self.keep_chain = sync, chain and folder is not None
        self.store = ClientStore() if store is None else store
        self.ledger = Ledger(None if folder is None else folder / "ledger.jsonl")
        self._totals = (0, 0)

    def begin(self, state: State) -> None:
        """Store the initial weights, from which the chain rebuilds all later ones."""
        if self.keep_chain:
            self._append(0, dict(state.base), {"initial": True})

    def totals(self) -> tuple[int, int]:
        """Bytes up and down (with catch-up) over all rounds so far."""
        return self._totals

    def append(self, row: Mapping[str, object]) -> None:
        """Write a ledger row, with the peak memory of this process."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.ledger.append({**row, "peak_memory_bytes": peak}, sync=self.sync)
        self._totals = (int(str(row["uplink_total"])), int(str(row["downlink_total"])))

    def link(self, round_: int, link: Link | None) -> None:
        """Append the link of a round to the chain."""
        if self.keep_chain and link is not None:
            self._append(round_, *link_tensors(link))

    def links(self) -> Iterator[tuple[int, Link]]:
        """Read the links of the chain back, each with its round; none where none are kept."""
        if self.keep_chain and self.folder is not None:
            for number, tensors, meta in read_links(self.folder / "chain"):
                if number:  # 0 is the initial weights
                    yield number, read_link(tensors, meta)

    def _append(self, round_: int, tensors: Tree, meta: dict[str, object]) -> None:
        if self.folder is not None:
            append_link(self.folder / "chain", round_, tensors, meta, sync=self.sync)

    def due(self, round_: int) -> bool:
        """Whether a checkpoint is due after this round."""
        return self.folder is not None and round_ % self.every == 0

    def save(self, state: State, round_: int, catch_up: CatchUp) -> None:
        """Write a checkpoint: what round ``round_ + 1`` needs."""
        if self.folder is None:
            return
        tensors = {f"base/{n}": t for n, t in state.base.items()}
        tensors |= {f"carried/{n}": t for n, t in state.carried.items()}
        tensors |= {f"moments/{n}": t for n, t in state.moments.items()}
        meta: dict[str, object] = {
            "round": round_,
            "memo": state.memo,
            "fixed": self.fixed,
            "base_digest": digest(state.base),
        }
        tensors |= catch_up.state() | self.store.state()
        save_checkpoint(self.folder / "checkpoint", tensors, meta)

    def restore(self, start: State, catch_up: CatchUp) -> tuple[State, int]:
        """Read the checkpoint back; ledger rows and links past it are cut.

        Args:
            start: The state of round 0; gives the plan and the device.
            catch_up: Takes the clients' versions.

        Returns:
            The state, and the round that it closed.

        Raises:
            CheckpointError: If there is none, it is damaged, or it is of another configuration.
        """
        if self.folder is None:
            raise CheckpointError("a run without a folder cannot be resumed")
        tensors, meta = load_checkpoint(self.folder / "checkpoint")
        stored = meta.get("fixed")
        changed = difference(stored, self.fixed) if isinstance(stored, dict) else ["fixed: unknown"]
        if changed:
            raise CheckpointError(
                f"{self.folder}: the checkpoint was written under another configuration "
                f"({'; '.join(changed)}); set these keys back, or start the run anew without resume"
            )
        memo = meta["memo"]
        if not isinstance(memo, dict):
            raise CheckpointError(f"{self.folder}: the checkpoint's memo is {memo!r}")
        round_ = int(str(meta["round"]))
        self.ledger.cut(round_)
        cut_links(self.folder / "chain", round_)
        last = self.ledger.rows[-1] if self.ledger.rows else {"round": None}
        if last["round"] != round_:
            raise CheckpointError(
                f"{self.folder / 'ledger.jsonl'} ends before round {round_}, where the checkpoint "
                "stands; restore the file from a copy, or start the run anew without resume"
            )
        self._totals = (int(str(last["uplink_total"])), int(str(last["downlink_total"])))
        catch_up.restore(tensors)
        self.store.restore(tensors)

        device = next(iter(start.base.values())).device

        def part(prefix: str) -> Tree:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        base = {n: t.to(device) for n, t in part("base/").items()}
        moments = part("moments/")
        return State(base, start.plan, part("carried/"), memo, moments=moments), round_


def stored_chunk(folder: Path) -> int | None:
    """Give the chunk of the run whose checkpoint a folder holds; None if it does not say."""
    fixed = load_checkpoint(folder / "checkpoint")[1].get("fixed")
    resolved = fixed.get("resolved") if isinstance(fixed, dict) else None
    chunk = resolved.get("chunk") if isinstance(resolved, dict) else None
    return chunk if isinstance(chunk, int) else None


def weights_at(folder: Path, round_: int, plan: Plan) -> Tree:
    """Rebuild the base weights after a round from the chain of a run.

    Args:
        folder: The run folder, written with ``output.chain=true``.
        round_: 0 gives the initial weights.
        plan: Of the run.

    Returns:
        The weights; bit for bit those of the run on the same build.

    Raises:
        CheckpointError: If the chain has no initial weights or does not reach the round.
    """
    stored = list(read_links(folder / "chain"))
    if not stored or stored[0][0] != 0 or stored[-1][0] < round_:
        reached = stored[-1][0] if stored else "no"
        raise CheckpointError(f"{folder / 'chain'} reaches {reached} round, not round {round_}")
    links = [read_link(tensors, meta) for number, tensors, meta in stored[1:] if number <= round_]
    return replay(stored[0][1], links, plan)
