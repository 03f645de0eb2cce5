"""The chain of a run: any missing, foreign or damaged link is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedraclora.errors import CheckpointError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.link import Link, Plan, Term
from fedraclora.protocol.method import Counters, State
from fedraclora.run.rebuild import state_at
from fedraclora.run.recorder import RunRecorder
from fedraclora.tree import Tree, digest
from fedraclora.weights.chain import CatchUp, link_tensors
from fedraclora.weights.links import append_link, link_digest

PLAN = Plan({"w": LayerView("conv1d", (5, 7))}, ("b",), weights=("w",), shapes={"w": (7, 5)})
ROUNDS = 9


def states(seed: float) -> list[State]:
    """States of a run that merges, carries factors, and now and then changes nothing."""
    base: Tree = {"w": torch.full((7, 5), seed), "b": torch.zeros(5)}
    found = [State(base, PLAN, {"w/B": torch.zeros(5, 2)}, Counters())]
    for round_ in range(1, ROUNDS + 1):
        factors = (torch.full((5, 2), seed), torch.full((2, 7), float(round_)))
        link = Link({"w": Term.of(factors, 1.5)}, {}) if round_ % 3 else None
        base = {**base, "w": base["w"] + 3 * seed * round_} if link else base
        carried = {"w/B": torch.full((5, 2), float(round_ // 2))} if round_ != 4 else {}
        found.append(State(base, PLAN, carried, Counters(age=round_), link))
    return found


def written(folder: Path, seed: float = 0.5, last: int = ROUNDS) -> Path:
    """A run folder up to a round, with a checkpoint at its end."""
    recorder = RunRecorder(folder, sync=False)
    first, *rest = states(seed)
    recorder.begin(first)
    recorder.append({"round": 0, "uplink_total": 0, "downlink_total": 0})
    for round_, state in enumerate(rest[:last], start=1):
        recorder.link(round_, state)
        recorder.append({"round": round_, "cohort": 3, "uplink_total": 0, "downlink_total": 0})
    recorder.save([first, *rest][last], last, CatchUp(first.base, 3))
    return folder


def link(folder: Path, round_: int) -> Path:
    return folder / "chain" / f"{round_:06d}.safetensors"


def test_every_state_comes_back(tmp_path: Path) -> None:
    folder = written(tmp_path)
    for round_, wanted in enumerate(states(0.5)):
        found = state_at(folder, round_)
        assert digest(found.base) == digest(wanted.base), round_
        assert digest(found.carried) == digest(wanted.carried), round_
        assert (found.counters, found.plan) == (wanted.counters, PLAN)
    last = state_at(folder)
    assert digest({**last.base, **last.carried}) == digest({**found.base, **found.carried})


def test_what_is_carried_is_stored_where_it_changed(tmp_path: Path) -> None:
    written(tmp_path)
    sizes = [link(tmp_path, round_).stat().st_size for round_ in (2, 3, 6)]
    assert sizes[0] > sizes[1]  # round 3 neither merges nor changes what is carried


@pytest.mark.parametrize("gone", range(ROUNDS + 1))
def test_any_link_that_is_missing_is_named(gone: int, tmp_path: Path) -> None:
    folder = written(tmp_path)
    link(folder, gone).unlink()
    for round_ in range(ROUNDS + 1):
        with pytest.raises(CheckpointError, match=rf"{gone:06d}\.safetensors"):
            state_at(folder, round_)


@pytest.mark.parametrize("number", range(ROUNDS + 1))
def test_a_link_of_another_run_is_named(number: int, tmp_path: Path) -> None:
    folder, other = written(tmp_path / "it"), written(tmp_path / "other", 0.25)
    link(folder, number).write_bytes(link(other, number).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{number:06d}\.safetensors"):
        state_at(folder, ROUNDS)


@pytest.mark.parametrize("gone", [0, 2, ROUNDS])
def test_a_run_with_a_missing_link_does_not_go_on(gone: int, tmp_path: Path) -> None:
    folder = written(tmp_path)
    link(folder, gone).unlink()
    with pytest.raises(CheckpointError, match=rf"{gone:06d}\.safetensors"):
        RunRecorder(folder).restore(states(0.5)[0], CatchUp(states(0.5)[0].base, 3))


def test_that_no_chain_was_kept_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"round 2 .*output\.chain=false"):
        state_at(tmp_path, 2)


def test_a_link_that_follows_no_other_is_named(tmp_path: Path) -> None:
    chain = written(tmp_path, last=3) / "chain"
    tensors, meta = link_tensors(states(0.5)[2].link or Link())
    append_link(chain, 2, tensors, meta, previous=link_digest(chain, 1) + "0")
    with pytest.raises(CheckpointError, match=r"000002.* does not follow from 000001"):
        state_at(tmp_path, 3)
