"""The chain of a run: any missing, foreign or damaged link is named; older chains are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedraclora.errors import CheckpointError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.link import Link, Plan, Term
from fedraclora.protocol.method import Counters, State
from fedraclora.run.ledger import Ledger
from fedraclora.run.rebuild import state_at, stored_plan
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
    assert stored_plan(folder) == PLAN
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


def older(folder: Path, rounds: list[int], cohort: int) -> Path:
    """A chain as older releases wrote it: nothing says what comes before."""
    first, *rest = states(0.5)
    append_link(folder / "chain", 0, dict(first.base), {"initial": True})
    for round_ in rounds:
        append_link(folder / "chain", round_, *link_tensors(rest[round_ - 1].link or Link()))
    ledger = Ledger(folder / "ledger.jsonl")
    for round_ in range(ROUNDS + 1):
        ledger.append({"round": round_, "cohort": cohort}, sync=False)
    return folder


def test_the_chain_of_an_older_release_is_read(tmp_path: Path) -> None:
    folder = older(tmp_path, [*range(1, ROUNDS + 1)], 3)
    assert stored_plan(folder) is None
    for round_, wanted in enumerate(states(0.5)):
        assert digest(state_at(folder, round_, PLAN).base) == digest(wanted.base)
    with pytest.raises(CheckpointError, match="older release"):
        state_at(folder, 2)


def test_a_gap_in_an_older_chain_is_a_round_of_nobody_or_an_error(tmp_path: Path) -> None:
    rounds = [1, 2, 4, 5, 7, 8]
    found = state_at(older(tmp_path / "nobody", rounds, 0), ROUNDS - 1, PLAN)
    assert digest(found.base) == digest(states(0.5)[ROUNDS - 1].base)
    with pytest.raises(CheckpointError, match=r"000003\.safetensors is missing"):
        state_at(older(tmp_path / "gap", rounds, 3), ROUNDS - 1, PLAN)


def test_that_no_chain_was_kept_is_said(tmp_path: Path) -> None:
    folder = older(tmp_path, [], 3)
    (folder / "chain" / "000000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"round 2 .*output\.chain=false"):
        state_at(folder, 2, PLAN)


def test_links_that_follow_those_of_an_older_release_name_the_last_of_them(tmp_path: Path) -> None:
    folder = older(tmp_path, [1, 2], 3)
    chain, last = folder / "chain", link_digest(folder / "chain")
    append_link(chain, 3, {}, {"link": {}}, previous=last)
    assert state_at(folder, 3, PLAN).base["w"][0, 0] == states(0.5)[2].base["w"][0, 0]
    append_link(chain, 2, {}, {"link": {}, "x": 1})
    with pytest.raises(CheckpointError, match=r"000003.* does not follow from 000002"):
        state_at(folder, 3, PLAN)
