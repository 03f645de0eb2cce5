"""Compacting a chain: the rounds that are kept give the same bits, the others are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fedraclora.commands import cli
from fedraclora.commands.compact import compact
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.method import Counters, State
from fedraclora.protocol.quantized import decode, encode
from fedraclora.run.folder import locked_folder
from fedraclora.run.initial import state_after
from fedraclora.run.rebuild import kept_rounds, state_at
from fedraclora.run.recorder import RunRecorder
from fedraclora.sketch import SketchSpec
from fedraclora.tree import digest
from fedraclora.weights.chain import CatchUp
from fedraclora.weights.files import load_tensors
from fedraclora.weights.links import append_link, link_digest, link_files
from fedraclora.weights.update import WeightHistory
from tests.unit.test_rebuild import PLAN, ROUNDS, states, written


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in (folder / "chain").iterdir())


def assert_kept(folder: Path, rounds: list[int]) -> None:
    """Of these rounds everything comes back, and the others are refused by name."""
    for round_, wanted in enumerate(states(0.5)):
        if round_ not in rounds:
            with pytest.raises(CheckpointError, match=f"after round {round_} are no longer in"):
                state_at(folder, round_)
            continue
        found = state_at(folder, round_)
        assert digest(found.base) == digest(wanted.base), round_
        assert digest(found.carried) == digest(wanted.carried), round_
        assert (found.counters, found.plan, found.link) == (wanted.counters, PLAN, None)


def test_kept_rounds_come_back_and_folded_ones_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    before = link_digest(folder / "chain")
    done = compact(folder, 4)
    assert names(folder) == ["000000", "000001-000004", "000005-000008", "000009"]
    assert (done.before[1], done.after[1], done.rounds) == (10, 4, "0 to 8 in steps of 4, 9")
    assert link_digest(folder / "chain") == before  # what follows, and the checkpoint, rest on it
    assert_kept(folder, [0, 4, 8, 9])
    with pytest.raises(CheckpointError, match=r"up to 4\. .* 0 to 8 .*of 4, 9$"):
        state_at(folder, 3)
    again = compact(folder, 4)
    assert again.before == again.after == done.after
    compact(folder, 8)
    assert names(folder) == ["000000", "000001-000008", "000009"]
    assert_kept(folder, [0, 8, 9])
    rebuilt = state_after(folder, 8, Counters)[0].base  # as for the checkpoint of a large model
    assert digest(rebuilt) == digest(states(0.5)[8].base)


def test_a_weight_is_kept_by_its_links_or_whole_whichever_is_smaller(tmp_path: Path) -> None:
    """35 numbers; of the two links with terms among three rounds each has 24."""
    compact(written(tmp_path), 2)
    stored = {f.last: [*load_tensors(f.path, "")[0]] for f in link_files(tmp_path / "chain")}
    assert [name for name in stored[2] if "carried" not in name] == ["link/dense/w"]
    factors = [f"link/terms/w/factors/{i}/numbers" for i in range(2)]
    assert [name for name in stored[4] if "carried" not in name] == factors


def test_a_run_goes_on_from_a_compacted_chain(tmp_path: Path) -> None:
    folder = written(tmp_path / "it", last=6)
    first, *rest = states(0.5)
    chain = folder / "chain"
    for round_ in (7, 8):  # past the checkpoint: they are cut, and may not be folded
        append_link(chain, round_, {}, {"link": {}, "counters": {}}, previous=link_digest(chain))
    compact(folder, 100)
    assert names(folder) == ["000000", "000001-000006", "000007", "000008"]
    recorder = RunRecorder(folder, sync=False)
    state, done = recorder.restore(first, CatchUp(first.base, 3))
    assert (done, digest(state.base)) == (6, digest(rest[5].base))
    assert list(recorder.links()) == []  # those after the fold
    for round_ in range(7, ROUNDS + 1):
        recorder.link(round_, rest[round_ - 1])
    assert [round_ for round_, _ in recorder.links()] == [7, 8, 9]
    assert_kept(folder, [0, 6, 7, 8, 9])
    assert link_digest(chain) == link_digest(written(tmp_path / "whole") / "chain")


@pytest.mark.parametrize("gone", ["000000", "000001-000004", "000005-000008"])
def test_a_fold_that_is_missing_or_of_another_run_is_named(gone: str, tmp_path: Path) -> None:
    folder, other = written(tmp_path / "it"), written(tmp_path / "other", 0.25)
    for each in (folder, other):
        compact(each, 4)
    path, round_ = folder / "chain" / f"{gone}.safetensors", gone[-6:]
    shutil.copy(other / "chain" / path.name, path)
    with pytest.raises(CheckpointError, match=rf"{round_}\.safetensors does not follow|{gone}"):
        state_at(folder, ROUNDS)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{round_}\.safetensors is missing"):
        state_at(folder, ROUNDS)
    with pytest.raises(CheckpointError, match=rf"{round_}\.safetensors is missing"):
        compact(folder, 8)


def test_what_a_kill_leaves_beside_a_fold_is_not_read_and_goes(tmp_path: Path) -> None:
    folder, whole = written(tmp_path / "it"), written(tmp_path / "whole")
    compact(folder, 4)
    for round_ in (2, 3, 4):
        name = f"{round_:06d}.safetensors"
        shutil.copy(whole / "chain" / name, folder / "chain" / name)
    assert_kept(folder, [0, 4, 8, 9])
    assert kept_rounds(folder / "chain") == "0 to 8 in steps of 4, 9"
    compact(folder, 4)
    assert names(folder) == ["000000", "000001-000004", "000005-000008", "000009"]


def test_links_in_fewer_bits_stay_in_them(tmp_path: Path) -> None:
    """Terms of 20 bytes on a weight of 140: in a fold they stand one after another."""
    plan = Plan({"w": LayerView("linear", (7, 5))}, weights=("w",), shapes={"w": (7, 5)})
    state, recorder = State({"w": torch.ones(7, 5)}, plan), RunRecorder(tmp_path, sync=False)
    recorder.begin(state)
    recorder.append({"round": 0, "uplink_total": 0, "downlink_total": 0})
    for round_ in (1, 2, 3):
        drawn = torch.linspace(-round_, 1.0, 21)
        B = decode(encode(drawn, [21], "int4"), [21], "int4").reshape(7, 3)
        spec = SketchSpec("gaussian", "right", 3, 5, seed=1, index=round_)
        link = Link({"w": Term.of((B, spec), 5 / 3, "int4")})
        state = State(apply_link(state.base, link, plan), plan, link=link)
        recorder.link(round_, state)
        recorder.append({"round": round_, "uplink_total": 0, "downlink_total": 0})
    recorder.save(state, 3, CatchUp(state.base, 1))
    compact(tmp_path, 100)
    tensors, meta = load_tensors(tmp_path / "chain" / "000001-000003.safetensors", "")
    assert [tensor.nbytes for tensor in tensors.values()] == [12, 12, 12]
    assert [part["terms"]["w"]["kind"] for part in (meta["link"], *meta["link"]["rest"])] == [
        "int4"
    ] * 3
    assert digest(state_at(tmp_path, 3).base) == digest(state.base)


def test_a_replica_elsewhere_follows_from_the_last_fold_on() -> None:
    """Of what lies before, a history that is read back knows nothing: it sends weights whole."""
    base = states(0.5)[0].base
    links = [
        Link({"w": Term.of((torch.ones(5, 1), torch.full((1, 7), i)), 1.0)}) for i in (3.0, 4.0)
    ]
    after = apply_link(apply_link(base, links[0], PLAN), links[1], PLAN)
    history = WeightHistory()
    history.recall(after, enumerate(links, start=3), 4)
    assert (history.oldest, history.version) == (2, 4)
    assert history.since(1).start is None
    assert [version for version, _ in history.since(2).links] == [3, 4]


def test_a_folder_that_cannot_be_compacted_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "it")
    with locked_folder(folder), pytest.raises(CheckpointError, match="another process is running"):
        compact(folder, 4)
    none = written(tmp_path / "none")
    shutil.rmtree(none / "chain")
    with pytest.raises(CheckpointError, match="has no chain"):
        compact(none, 4)
    early = written(tmp_path / "early")
    shutil.rmtree(early / "checkpoint")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        compact(early, 4)
    with pytest.raises(ConfigError, match="--every=0"):
        compact(folder, 0)
    for words, said in (
        ([str(tmp_path / "nowhere")], "is not a run folder"),
        ([str(folder)], "has no config.yaml"),
    ):
        assert cli.run("compact", words) == 1
        assert said in capsys.readouterr().err
    assert len(names(folder)) == ROUNDS + 1


def test_folds_are_made_only_where_links_give_the_bits_of_the_run(tmp_path: Path) -> None:
    """Another processor may round a product otherwise: then a fold would be of other weights."""
    folder = tmp_path
    recorder = RunRecorder(folder, sync=False)
    first, second, *_ = states(0.5)
    recorder.begin(first)
    recorder.append({"round": 0, "uplink_total": 0, "downlink_total": 0})
    for round_ in (1, 2):
        recorder.link(round_, second)
        recorder.append({"round": round_, "uplink_total": 0, "downlink_total": 0})
    drifted = {**second.base, "w": second.base["w"].nextafter(torch.ones(1))}
    recorder.save(State(drifted, PLAN, second.carried, Counters()), 2, CatchUp(first.base, 3))
    with pytest.raises(CheckpointError, match="give other weights here"):
        compact(folder, 2)
    assert len(names(folder)) == 3
