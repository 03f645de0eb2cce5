"""What a run writes, and that it can be read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typing_extensions import override

from fedraclora.errors import CheckpointError
from fedraclora.protocol.link import Link, Plan, Term
from fedraclora.protocol.method import Counters, State
from fedraclora.run.ledger import read_ledger
from fedraclora.run.recorder import RunRecorder, Stopwatch
from fedraclora.sketch import SketchSpec
from fedraclora.weights.chain import CatchUp
from fedraclora.weights.files import load_checkpoint
from fedraclora.weights.links import read_links
from tests.common import normal

SPEC = SketchSpec("coordinate", "right", 2, 7, seed=1, index=0)
LINK = Link({"w": Term.of((torch.ones(5, 2), SPEC), 1.5)}, {"b": torch.ones(5)})


@pytest.fixture(autouse=True)
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count flushes to the disk, and save their time."""
    calls: list[int] = []
    monkeypatch.setattr("os.fsync", calls.append)
    return calls


def state() -> State:
    """Odd sizes and dtypes, so that nothing lies at a round address by chance."""
    base = {"w": normal(5, 7), "b": normal(5), "odd": normal(3).float()}
    return State(
        base,
        Plan({}),
        carried={"w/B": normal(5, 2), "w": normal(2)},
        counters=Counters(sketch=4, age=1),
        link=LINK,
        report={"x": 1.0},
        notes=("capped",),
    )


def row(round_: int, up: int = 0, down: int = 0) -> dict[str, object]:
    return {"round": round_, "uplink_total": up, "downlink_total": down}


def caught_up(clients: int = 3) -> CatchUp:
    catch_up = CatchUp(state().base, clients)
    catch_up.add(LINK)
    catch_up.fetch(torch.tensor([1]))
    catch_up.add(None)
    return catch_up


def filled(folder: Path, rounds: int = 4, **settings: object) -> RunRecorder:
    """A book of four rounds with a checkpoint after the second."""
    given: Any = {"fixed": {"seed": 1}, "every": 2} | settings
    recorder = RunRecorder(folder, **given)
    recorder.begin(state())
    recorder.append(row(0))
    for round_ in range(1, rounds + 1):
        recorder.link(round_, state())
        recorder.append(row(round_, 10 * round_, 20 * round_))
        if round_ == 2:
            recorder.save(state(), round_, caught_up())
    return recorder


# --- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    filled(tmp_path)
    wanted, start = state(), State({"w": torch.zeros(5, 7)}, Plan({"p": None}))
    catch_up = CatchUp(wanted.base, 3)
    found, round_ = RunRecorder(tmp_path, fixed={"seed": 1}).restore(start, catch_up)
    assert round_ == 2
    assert found.plan is start.plan
    assert found.counters == wanted.counters
    assert list(found.base) == list(wanted.base)
    assert list(found.carried) == list(wanted.carried)
    for name, tensor in wanted.base.items():
        assert torch.equal(found.base[name], tensor)
        assert found.base[name].dtype == tensor.dtype
    assert all(torch.equal(found.carried[n], t) for n, t in wanted.carried.items())
    assert (found.link, found.report, found.notes) == (None, {}, ())
    assert catch_up.version == 2
    assert catch_up.versions.tolist() == [0, 1, 0]


# A matrix product rounds differently at another alignment: where restored tensors lay in the
# buffer of the file, most resumed runs drifted from the ones that were not stopped.
def test_restored_tensors_are_aligned_as_torch_aligns_its_own(tmp_path: Path) -> None:
    filled(tmp_path)
    wanted = state()
    found, _ = RunRecorder(tmp_path, fixed={"seed": 1}).restore(wanted, caught_up())
    tensors = {**found.base, **{f"carried/{n}": t for n, t in found.carried.items()}}
    assert {n: t.data_ptr() % 64 for n, t in tensors.items()} == dict.fromkeys(tensors, 0)


def test_rows_and_links_past_the_checkpoint_are_cut(tmp_path: Path) -> None:
    filled(tmp_path)
    recorder = RunRecorder(tmp_path, fixed={"seed": 1})
    assert len(recorder.ledger.rows) == 5
    recorder.restore(state(), caught_up())
    assert [r["round"] for r in recorder.ledger.rows] == [0, 1, 2]
    assert [r["round"] for r in read_ledger(tmp_path / "ledger.jsonl")] == [0, 1, 2]
    assert [r for r, _, _ in read_links(tmp_path / "chain")] == [0, 1, 2]
    assert recorder.totals() == (20, 40)
    recorder.append(row(3, 30, 60))
    assert recorder.totals() == (30, 60)


def test_changed_code_is_said_by_its_function_and_no_key_is_blamed(tmp_path: Path) -> None:
    """It was another configuration, whose keys were to be set back."""
    fixed: Any = {"seed": 1, "code": {"mine:plain": "0" * 16, "mine:loss": "2" * 16}}
    filled(tmp_path, fixed=fixed)
    now = {**fixed, "code": {**fixed["code"], "mine:plain": "1" * 16}}
    with pytest.raises(
        CheckpointError, match=r"the code of mine:plain, or of something that it uses"
    ) as at:
        RunRecorder(tmp_path, fixed=now).restore(state(), caught_up())
    assert "configuration" not in str(at.value)


def test_a_checkpoint_of_before_has_no_digest_of_the_rows(tmp_path: Path) -> None:
    filled(tmp_path, fixed={"seed": 1, "resolved": {"chunk": 2}})
    now: Any = {"seed": 1, "resolved": {"chunk": 2, "rows": "0" * 16}}
    assert RunRecorder(tmp_path, fixed=now).restore(state(), caught_up())[1] == 2


def test_another_configuration_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    filled(tmp_path)
    recorder = RunRecorder(tmp_path, fixed={"seed": 2})
    with pytest.raises(CheckpointError, match=r"another configuration \(seed: 1 -> 2\)"):
        recorder.restore(state(), caught_up())
    assert len(read_ledger(tmp_path / "ledger.jsonl")) == 5
    assert len(list(read_links(tmp_path / "chain"))) == 5


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        RunRecorder(tmp_path).restore(state(), caught_up())


def test_a_run_without_a_folder_cannot_be_resumed() -> None:
    recorder = RunRecorder(None)
    recorder.begin(state())
    recorder.append(row(0))
    recorder.link(1, state())
    recorder.save(state(), 1, caught_up())
    assert not recorder.due(10)
    assert len(recorder.ledger.rows) == 1
    with pytest.raises(CheckpointError, match="without a folder"):
        recorder.restore(state(), caught_up())


class Broken(Counters):
    """Is no numbers by name when it is written."""

    @override
    def stored(self) -> dict[str, int]:
        return [1]  # type: ignore[return-value]


def test_a_memo_that_is_none_is_refused(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path)
    recorder.save(replace(state(), counters=Broken()), 1, caught_up())
    with pytest.raises(CheckpointError, match=r"counters of the checkpoint are \[1\]"):
        recorder.restore(state(), caught_up())


def test_a_later_checkpoint_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    recorder = filled(tmp_path)
    recorder.save(state(), 4, caught_up())
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["checkpoint.safetensors"]
    _, meta = load_checkpoint(tmp_path / "checkpoint")
    assert meta["round"] == 4


def test_a_checkpoint_is_due_every_so_many_rounds(tmp_path: Path) -> None:
    recorder = RunRecorder(tmp_path, every=3)
    assert [t for t in range(1, 10) if recorder.due(t)] == [3, 6, 9]


# --- chain and ledger ----------------------------------------------------------------------------


def test_the_chain_starts_with_the_initial_weights(tmp_path: Path) -> None:
    filled(tmp_path)
    (round_, tensors, meta), *links = list(read_links(tmp_path / "chain"))
    assert (round_, meta["initial"]) == (0, True)
    assert all(torch.equal(tensors[n], t) for n, t in state().base.items())
    assert len(links) == 4


def test_a_round_that_changed_nothing_has_an_empty_link(tmp_path: Path) -> None:
    recorder = filled(tmp_path, 1)
    recorder.link(2, replace(state(), link=None))
    *_, (round_, tensors, meta) = read_links(tmp_path / "chain")
    assert (round_, tensors, meta["link"]) == (2, {}, {})


def test_the_chain_can_be_left_out(tmp_path: Path) -> None:
    filled(tmp_path, chain=False)
    assert not (tmp_path / "chain").exists()
    assert len(read_ledger(tmp_path / "ledger.jsonl")) == 5


def test_rows_hold_the_peak_memory(tmp_path: Path) -> None:
    recorder = filled(tmp_path)
    peak = recorder.ledger.rows[-1]["peak_memory_bytes"]
    assert isinstance(peak, int)
    assert peak > 1 << 20


def test_rows_are_flushed_where_that_is_asked_for(tmp_path: Path, flushes: list[int]) -> None:
    RunRecorder(tmp_path / "a", sync=True).append(row(0))
    assert len(flushes) == 1
    RunRecorder(tmp_path / "b", sync=False).append(row(0))
    assert len(flushes) == 1


def test_a_checkpoint_is_always_flushed(tmp_path: Path, flushes: list[int]) -> None:
    RunRecorder(tmp_path, sync=False).save(state(), 1, caught_up())
    assert len(flushes) == 2  # the file, and the folder that names it


def test_links_are_not_flushed_where_that_is_not_asked_for(
    tmp_path: Path, flushes: list[int]
) -> None:
    recorder = RunRecorder(tmp_path, sync=False)
    recorder.begin(state())
    recorder.link(1, state())
    assert flushes == []


def test_a_stopwatch_adds_up_laps_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = iter([10.0, 11.0, 11.5, 14.0]), iter([5.0, 5.5, 5.5, 6.75])
    # In this module alone: pytest, too, reads the clock while a test runs.
    clock = SimpleNamespace(perf_counter=lambda: next(wall), process_time=lambda: next(cpu))
    monkeypatch.setattr("fedraclora.run.recorder.time", clock)
    watch = Stopwatch()
    for name in ("train", "write", "train"):
        watch.lap(name)
    assert watch.columns == {
        "seconds": {"train": 3.5, "write": 0.5},
        "cpu_seconds": {"train": 1.75, "write": 0.0},
    }
