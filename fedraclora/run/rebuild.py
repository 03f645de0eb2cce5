"""Rebuild the weights of any round from the files of a run."""

from __future__ import annotations

from pathlib import Path

from fedraclora.errors import CheckpointError
from fedraclora.protocol.method import Counters, Draw, Method, State
from fedraclora.run.initial import checkpoint_base, state_after
from fedraclora.run.recorder import checkpoint_meta, hold_chain, hold_checkpoint
from fedraclora.tree import Tree, below
from fedraclora.weights.chain import read_plan
from fedraclora.weights.files import load_checkpoint
from fedraclora.weights.links import link_files


def state_at(
    folder: Path,
    round_: int | None = None,
    method: Method | None = None,
) -> State:
    """Rebuild the server's state after a round: base weights, and the method's tensors.

    Args:
        folder: The run folder, written with ``output.chain=true``; for the round of the last
            checkpoint, that is enough.
        round_: 0 gives the initial state; None the last checkpoint.
        method: The run's method, for a complete state; None: state that only some methods keep is
            left out.

    Returns:
        The state without moments, on the CPU; bit for bit as in the run on the same build.

    Raises:
        CheckpointError: If a file is damaged, missing or of another run; if the run did not reach
            the round, or it was compacted into a later one.
    """
    kind = Counters if method is None else method.counters
    if round_ is None:
        tensors, meta = load_checkpoint(folder / "checkpoint")
        carried = below(tensors, "carried/")
        hold_checkpoint(folder, tensors, meta)
        base = checkpoint_base(below(tensors, "base/"), meta, folder)
        return State(base, read_plan(meta["plan"]), carried, kind.read(meta["counters"]))
    chain = folder / "chain"
    _check_kept(chain, round_)
    state, _ = state_after(folder, round_, kind)
    hold_chain(folder, checkpoint_meta(folder))
    return state


def kept_rounds(chain: Path) -> str:
    """List the rounds after which weights can be rebuilt, as text.

    Example:
        0 to 300 in steps of 100, 301, 302
    """
    rounds = [file.last for file in link_files(chain)]
    runs: list[list[int]] = []
    for round_ in rounds:
        if runs and (len(runs[-1]) == 1 or round_ - runs[-1][-1] == runs[-1][1] - runs[-1][0]):
            runs[-1].append(round_)
        else:
            runs.append([round_])
    return ", ".join(map(_named_run, runs))


def _named_run(run: list[int]) -> str:
    if len(run) < 3:
        return ", ".join(map(str, run))
    step = run[1] - run[0]
    return f"{run[0]} to {run[-1]}" + (f" in steps of {step}" if step > 1 else "")


def _check_kept(chain: Path, round_: int) -> None:
    """Reject a round that was compacted with later ones."""
    for file in link_files(chain):
        if file.first <= round_ < file.last:
            raise CheckpointError(
                f"the weights after round {round_} are no longer in {chain}: `fedraclora "
                f"compact` joined the rounds up to {file.last}. Choose one of the rounds that "
                f"were kept: {kept_rounds(chain)}"
            )


def weights_at(folder: Path, round_: int | None, method: Method, draw: Draw) -> Tree:
    """Rebuild the effective weights after a round: W_t, as the run measured them.

    If clients keep a personal part of the model, these are the server's weights.

    Args:
        folder: The run folder, as for `state_at`.
        round_: As for `state_at`.
        method: The run's method.
        draw: The run's sketches.

    Raises:
        CheckpointError: As `state_at`.
    """
    return method.weights(state_at(folder, round_, method), draw)
