"""What a run folder holds by digest: its config, the data's files, its ledger, key and summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedraclora.binding import Plain
from fedraclora.errors import CheckpointError, DataError
from fedraclora.protocol.link import Plan
from fedraclora.protocol.method import Counters, State
from fedraclora.run.digests import FILE, check_data, data_files, sealed
from fedraclora.run.folder import amend, begin_folder, read_config, read_summary, write_summary
from fedraclora.run.ledger import Ledger, read_ledger
from fedraclora.run.recorder import RunRecorder
from fedraclora.weights.chain import CatchUp

OF_A_RUN = {"weights_digest": "81ded5146e52"}
PLAIN: Plain = {
    "seed": 10,
    "rounds": 3,
    "data": {"name": "digits"},
    "output": {"dir": None},
    **{group: {"name": "any"} for group in ("method", "local", "engine")},
}


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_digit_in_the_config_is_seen(tmp_path: Path) -> None:
    begin_folder(tmp_path, PLAIN)
    assert read_config(tmp_path) == PLAIN
    change(tmp_path / "config.yaml", "seed: 10", "seed: 11")
    with pytest.raises(CheckpointError, match=r"config\.yaml .*command line"):
        read_config(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"no digests\.json"):
        read_config(tmp_path)


def test_a_config_that_is_amended_is_valid_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_folder(tmp_path, PLAIN)
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.name == "config.yaml":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            amend(tmp_path, {**PLAIN, "rounds": 9})
    assert read_config(tmp_path) == PLAIN
    (tmp_path / "summary.json").write_text("{}")
    assert amend(tmp_path, {**PLAIN, "rounds": 9}) == ["goes on with rounds: 3 -> 9"]
    assert read_config(tmp_path)["rounds"] == 9
    assert not (tmp_path / "summary.json").exists()
    assert amend(tmp_path, {**PLAIN, "rounds": 9}) == []


def test_a_folder_in_which_nothing_but_digests_were_written_can_be_begun(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("torn")
    begin_folder(tmp_path, PLAIN)
    assert read_config(tmp_path) == PLAIN


def test_any_digit_of_a_summary_is_seen(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.jsonl").append({"round": 0})
    summary = {"metrics": {"accuracy": 0.875}, "path": tmp_path, "nan": float("nan")}
    write_summary(tmp_path, summary | OF_A_RUN)
    assert read_summary(tmp_path)["metrics"] == {"accuracy": 0.875}
    change(tmp_path / "summary.json", "0.875", "0.876")
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged"):
        read_summary(tmp_path)
    write_summary(tmp_path, OF_A_RUN)
    Ledger(tmp_path / "ledger.jsonl").append({"round": 1})
    with pytest.raises(
        CheckpointError, match=r"summary\.json and the ledger\.jsonl .*not belong together"
    ):
        read_summary(tmp_path)


def test_a_summary_without_a_digest_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"rounds": 3} | OF_A_RUN))
    with pytest.raises(CheckpointError, match=r"summary\.json is damaged"):
        read_summary(tmp_path)
    path.write_text(sealed({"rounds": 3}))
    with pytest.raises(CheckpointError, match="not the summary of a run"):
        read_summary(tmp_path)


def test_any_digit_of_a_ledger_is_seen_by_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for round_ in range(3):
        ledger.append({"round": round_, "seconds": {"train": 1.25}, "total": 40 + round_})
    whole, rows = path.read_text(), read_ledger(path)
    assert rows == ledger.rows  # readers see no digest
    for place, letter in enumerate(whole):
        if letter.isdigit():
            other = str((int(letter) + 1) % 10)
            path.write_text(whole[:place] + other + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=r"ledger\.jsonl, line . is damaged"):
                read_ledger(path)
    lines = whole.splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2]]))
    with pytest.raises(CheckpointError, match="earlier row"):
        read_ledger(path)


def test_a_row_without_a_digest_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"round": 0, "x": 5}\n')
    with pytest.raises(CheckpointError, match="line 1 is damaged"):
        read_ledger(path)


def saved(folder: Path) -> State:
    """A private run of two rounds that stands at its checkpoint."""
    begin_folder(folder, PLAIN)
    (folder / "private").mkdir()
    (folder / "private" / "noise.key").write_bytes(bytes(range(32)))
    state = State({"w": torch.zeros(5, 7)}, Plan({}), counters=Counters(age=1))
    recorder = RunRecorder(folder, sync=False)
    recorder.begin(state)
    for round_ in (0, 1, 2):
        if round_:
            recorder.link(round_, state)
        recorder.append({"round": round_, "uplink_total": 7, "downlink_total": 7})
    recorder.save(state, 2, CatchUp(state.base, 3))
    return state


@pytest.mark.parametrize("name", ["private/noise.key", "config.yaml", FILE, "ledger.jsonl"])
def test_what_a_checkpoint_rests_on_must_be_there(name: str, tmp_path: Path) -> None:
    state = saved(tmp_path)
    assert RunRecorder(tmp_path).restore(state, CatchUp(state.base, 3))[1] == 2
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=Path(name).name):
        RunRecorder(tmp_path).restore(state, CatchUp(state.base, 3))


def test_a_bit_of_the_key_is_seen(tmp_path: Path) -> None:
    state = saved(tmp_path)
    (tmp_path / "private" / "noise.key").write_bytes(bytes([1, *range(1, 32)]))
    with pytest.raises(CheckpointError, match=r"noise\.key is missing"):
        RunRecorder(tmp_path).restore(state, CatchUp(state.base, 3))


def test_the_ledger_of_another_run_is_refused(tmp_path: Path) -> None:
    state = saved(tmp_path / "it")
    saved(tmp_path / "other")
    other = tmp_path / "other" / "ledger.jsonl"
    Ledger(other).cut(1)
    Ledger(other).append({"round": 2, "uplink_total": 8, "downlink_total": 7})
    (tmp_path / "it" / "ledger.jsonl").write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"ledger\.jsonl does not belong"):
        RunRecorder(tmp_path / "it").restore(state, CatchUp(state.base, 3))


def test_files_of_the_data_are_known_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.npz").write_bytes(b"a")
    (folder / "table.csv").write_bytes(b"b")
    data = {"name": "own", "samples": str(folder), "file": "table.csv", "root": str(folder)}
    found = data_files({**data, "test_function": "package:function", "loss": "cross_entropy"})
    assert {key: [*files] for key, files in found.items()} == {
        "samples": ["0.npz", "table.csv"],
        "file": ["table.csv"],
    }
    begin_folder(tmp_path / "run", {**PLAIN, "data": data})
    check_data(tmp_path / "run", data)
    (folder / "table.csv").write_bytes(b"c")
    with pytest.raises(DataError, match=r"table\.csv has changed"):
        check_data(tmp_path / "run", data)
