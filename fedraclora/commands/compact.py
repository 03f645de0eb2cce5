"""``fedraclora compact RUN``: combine the stored updates of a run, for fewer files and bytes.

A compacted run can be resumed, and ends with bit-identical weights. `export`, `load_weights` and
`init_from=RUN` work for the rounds that are kept; the weights of other rounds are no longer stored.

A compacted update replaces those of several rounds. For each weight it stores the terms of all of
them in order, or the final weight and its adapter, whichever is smaller
(`fedraclora.weights.chain.LinkSizes`); of the tensors that the method carries it stores the final
values. Every reader of the chain therefore gets the same bits at the rounds that are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from fedraclora.errors import CheckpointError
from fedraclora.limits import ConfigKey, Count, limited
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
    """The result of compacting a run.

    Attributes:
        before, after: Bytes and number of files of the chain.
        rounds: The rounds whose weights can still be rebuilt, as text.
    """

    before: tuple[int, int]
    after: tuple[int, int]
    rounds: str


@limited("")
def compact(folder: Path, every: Annotated[Count, ConfigKey("--every")]) -> Compacted:
    """Compact the updates of a run up to its checkpoint.

    Each compacted update replaces its originals atomically: if the process is killed, the folder
    stays valid, and another call finishes the work.

    Args:
        folder: The run folder.
        every: Keep every ``every``-th round, besides the initial state and the last round.

    Raises:
        CheckpointError: If the run is running, stores no chain, or has no checkpoint yet; if a file
            is damaged or missing; or if this build of torch rebuilds other weights than the run
            had, so that compacting would not be exact.
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
    """Yield the groups of update files that each become one file."""
    group: list[LinkFile] = []
    for file in link_files(chain):
        if 0 < file.last <= done:
            group.append(file)
            if file.last % every == 0 or file.last == done:
                yield group
                group = []


def _fold(folder: Path, groups: Mapping[int, list[LinkFile]]) -> None:
    """Compact groups of updates; a key is the round of the group's last update."""
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
    """Combine the updates between two states into one link: its tensors and metadata.

    Args:
        start: The first state.
        end: The later state.
        history: The weight updates in between, from version 0 on.

    Raises:
        CheckpointError: If the link does not rebuild the later state's weights.
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
    changed, removed = carried_change(start.carried, end.carried)
    return tensors | changed, meta | removed


def main(words: Sequence[str]) -> None:
    """Compact a run, and print the sizes before and after."""
    parser = argparse.ArgumentParser("fedraclora compact", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run that is not running")
    every = "keep each N-th round (100), beside the first and the last checkpoint"
    parser.add_argument("--every", type=int, default=100, metavar="N", help=every)
    arguments = parser.parse_args(words)
    folder = arguments.run.expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a run folder. Name the folder of a run")
    read_config(folder)
    done = compact(folder, arguments.every)
    table = Table("chain", "bytes", "files", box=None)
    for when, (size, files) in (("before", done.before), ("after", done.after)):
        table.add_row(when, f"{size:,}", f"{files:,}")
    console_for_tables().print(table)
    print(f"rounds that can be exported: {done.rounds}")
