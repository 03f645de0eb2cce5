"""``fedraclora compact RUN``: fold links of a run's chain, for fewer files and bytes.

The run goes on as before, and ends with the same weights to the bit. `export`, `load_weights` and
`init_from=RUN` find the rounds that were kept; the others are gone.

A fold leads through several rounds at once. Of each weight it has the terms of their links, in
order, or the weight as it was at the end with what stands beside it, whichever is smaller
(`fedraclora.weights.chain.LinkSizes`); what the method carries it has as it was at the end. So
whoever reads the chain comes to the same bits, at the rounds that were kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.protocol.link import Link, Plan, apply_link
from fedraclora.protocol.method import Counters, State
from fedraclora.run.folder import locked_folder, read_config, resume_word
from fedraclora.run.initial import read_states
from fedraclora.run.rebuild import kept_rounds, state_at
from fedraclora.run.recorder import carried_change, checkpoint_meta
from fedraclora.terminal.progress import console_for_tables
from fedraclora.tree import Tree, digest
from fedraclora.weights.chain import link_tensors, read_link
from fedraclora.weights.links import LinkFile, fold_links, link_files, remove_folded
from fedraclora.weights.update import WeightHistory


@dataclass(frozen=True)
class Compacted:
    """What compacting came to.

    Attributes:
        before, after: Of the chain, bytes and files.
        rounds: After which the chain gives the weights, in words.
    """

    before: tuple[int, int]
    after: tuple[int, int]
    rounds: str


def compact(folder: Path, every: int) -> Compacted:
    """Compact the updates of a run up to its checkpoint.

    Each fold takes the place of its links in one move, so that a process that is killed leaves a
    folder that is whole; another call does the rest.

    Args:
        folder: The run folder.
        every: Rounds that are kept: those that it divides, the initial state, and the last.

    Raises:
        CheckpointError: If the run is running, keeps no chain, has no checkpoint yet, or if a file
            is damaged or missing; and if this build computes other weights from the links than the
            run did, so that folds would not be exact.
    """
    with locked_folder(folder):
        chain, meta = folder / "chain", checkpoint_meta(folder)
        if not link_files(chain):
            raise CheckpointError(
                f"{folder} has no chain (output.chain=false), so there is nothing to compact"
            )
        if not meta:
            raise CheckpointError(
                f"{folder} has no checkpoint yet, and updates are compacted up to it: resume it "
                f"first with {resume_word(folder)}"
            )
        last = state_at(folder, meta["round"])
        if digest(last.base) != (meta.get("base_digest") or digest(state_at(folder).base)):
            raise CheckpointError(
                f"{folder}: the stored updates give other weights here than where the run "
                "computed them, since processors and releases of torch round differently. "
                "Compact it there."
            )
        before = _size(chain)
        remove_folded(chain)
        _fold(folder, {group[-1].last: group for group in _groups(chain, every, meta["round"])})
        return Compacted(before, _size(chain), kept_rounds(chain))


def _size(chain: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in chain.glob("*.safetensors")]
    return sum(sizes), len(sizes)


def _groups(chain: Path, every: int, done: int) -> Iterator[list[LinkFile]]:
    """Divide the files of the chain after the initial weights into those that become one."""
    group: list[LinkFile] = []
    for file in link_files(chain):
        if 0 < file.last <= done:
            group.append(file)
            if file.last % every == 0 or file.last == done:
                yield group
                group = []


def _fold(folder: Path, groups: Mapping[int, list[LinkFile]]) -> None:
    """Fold groups of links, each by the round of its last one."""
    start, history, first = State({}, Plan({})), WeightHistory(), dict[str, Any]()
    for number, state, meta in read_states(folder, Counters):
        if number > max(groups, default=0):
            break
        first = first or meta
        history.publish(state.base, history.version + 1, state.link)
        if number and number not in groups:
            continue
        if len(files := groups.get(number, [])) > 1:
            tensors, described = _folded(start, state, history)
            described |= {"counters": meta["counters"], "previous": first["previous"]}
            fold_links(folder / "chain", files, tensors, described)
        start, history, first = state, WeightHistory(), {}
        history.publish(state.base, 0)


def _folded(start: State, end: State, history: WeightHistory) -> tuple[Tree, dict[str, object]]:
    """Describe in one link how a state became a later one.

    Args:
        start: The first state.
        end: The later one.
        history: Of the weights in between, from version 0 on.

    Raises:
        CheckpointError: If that link does not give the same weights.
    """
    update = history.since(0)
    parts = [part for _, link in update.links for part in link.parts()]
    whole = [Link(dense=update.dense)] if update.dense else []
    first, *rest = [*parts, *whole] or [Link()]
    tensors, meta = link_tensors(replace(first, rest=tuple(rest)))
    rebuilt = apply_link(start.base, read_link(tensors, meta), start.plan)
    if digest(rebuilt) != digest(end.base):
        raise CheckpointError(
            "the compacted updates would give other weights, so they stay as they are. Please "
            "report this with the method of the run"
        )
    changed, gone = carried_change(start.carried, end.carried)
    return tensors | changed, meta | gone


def main(words: Sequence[str]) -> None:
    """Compact the run that is named."""
    parser = argparse.ArgumentParser("fedraclora compact", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run that is not running")
    every = "keep each N-th round (100), beside the first and the last checkpoint"
    parser.add_argument("--every", type=int, default=100, metavar="N", help=every)
    asked = parser.parse_args(words)
    folder = asked.run.expanduser()
    if asked.every < 1:
        raise ConfigError(f"--every={asked.every}: give a number of rounds, 1 or more")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a run folder. Name the folder of a run")
    read_config(folder)
    done = compact(folder, asked.every)
    table = Table("chain", "bytes", "files", box=None)
    for when, (size, files) in (("before", done.before), ("after", done.after)):
        table.add_row(when, f"{size:,}", f"{files:,}")
    console_for_tables().print(table)
    print(f"rounds that can be exported: {done.rounds}")
