from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from fedraclora.errors import CheckpointError
from fedraclora.tree import Tree
from fedraclora.weights import files
from fedraclora.weights.files import (
    CHECKPOINT,
    config_difference,
    flatten,
    load_checkpoint,
    replacing,
    save_checkpoint,
    save_tensors,
)
from fedraclora.weights.links import append_link, cut_links, link_digest, read_links

META: dict[str, object] = {
    "round": 3,
    "config_digest": "ab",
    "counters": {"drawn": 2},
    "none": None,
}


def tensors() -> Tree:
    wide = torch.arange(12, dtype=torch.float64).reshape(3, 4) / 7
    shared = torch.arange(6.0)
    tied = torch.ones(2, 5)
    return {
        "z/turned": wide.T,
        "half": torch.arange(5, dtype=torch.bfloat16),
        "number": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "empty, of numpy": torch.from_numpy(np.zeros(3, np.int32)[np.flatnonzero(np.zeros(3))]),
        "a part": shared[1:3],
        "a": shared,
        "tied 1": tied,
        "tied 2": tied,
        "ints": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "spread": torch.ones(1, 1).expand(2, 3),
        "trained": torch.ones(2, requires_grad=True),
    }


def test_all_layouts_and_dtypes_come_back_in_order(tmp_path: Path) -> None:
    given_ = tensors()
    save_checkpoint(tmp_path / "new" / "checkpoint", given_, META)
    got, meta = load_checkpoint(tmp_path / "new" / "checkpoint")
    assert list(got) == list(given_)
    assert meta == META
    for name, tensor in given_.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
        assert not got[name].requires_grad


def test_an_empty_state_is_a_state(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {}, {})
    assert load_checkpoint(tmp_path) == ({}, {})


def test_what_was_saved_does_not_change_with_the_tensors(tmp_path: Path) -> None:
    weight = torch.ones(2, 3)
    save_checkpoint(tmp_path, {"w": weight}, {})
    weight.zero_()
    assert torch.equal(load_checkpoint(tmp_path)[0]["w"], torch.ones(2, 3))


def test_any_flipped_byte_is_refused_by_name(tmp_path: Path) -> None:
    state = {"w": torch.arange(4.0), "b": torch.tensor([1.5], dtype=torch.bfloat16)}
    save_checkpoint(tmp_path, state, META)
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for index in range(len(whole)):
        damaged = bytearray(whole)
        damaged[index] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors.* damaged"):
            load_checkpoint(tmp_path)


def test_any_truncated_file_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"w": torch.arange(4.0)}, META)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    for length in range(len(whole)):
        (tmp_path / CHECKPOINT).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="without resume"):
            load_checkpoint(tmp_path)


@pytest.mark.parametrize("station", ["os.replace", "os.fsync"])
def test_a_kill_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, station: str
) -> None:
    save_checkpoint(tmp_path, {"w": torch.zeros(2)}, {"round": 1})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(station, killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, {"w": torch.ones(2)}, {"round": 2})
    assert load_checkpoint(tmp_path)[1] == {"round": 1}
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_leftover_of_a_killed_writer_is_written_over(tmp_path: Path) -> None:
    with replacing(tmp_path / CHECKPOINT) as partial:
        name = partial
        partial.write_bytes(b"")
    name.write_bytes(b"torn")
    save_checkpoint(tmp_path, {"w": torch.ones(2)}, META)
    assert load_checkpoint(tmp_path)[1] == META
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_the_file_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (calls.append("flush"), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    save_checkpoint(tmp_path, {"w": torch.ones(2)}, {})
    assert calls == ["flush", "rename", "flush"]
    calls.clear()
    append_link(tmp_path, 1, {"w": torch.ones(2)}, {}, previous="", sync=False)
    assert calls == ["rename"]


def test_meta_data_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be JSON"):
        save_checkpoint(tmp_path, {}, {"x": object()})
    assert not list(tmp_path.iterdir())


def chain(folder: Path, rounds: list[int]) -> None:
    for round_ in rounds:
        value, before = torch.full((2, 3), float(round_)), link_digest(folder)
        path = append_link(folder, round_, {"b": value}, {"rank": 2}, previous=before)
        assert path == folder / f"{round_:06d}.safetensors"


def test_links_come_back_in_the_order_of_rounds(tmp_path: Path) -> None:
    rounds = [1, 3, 12, 999_999, 1_000_001]
    chain(tmp_path, rounds)
    (tmp_path / ".000013.safetensors.partial").write_bytes(b"torn")
    (tmp_path / "notes.safetensors").write_bytes(b"not a link")
    found = list(read_links(tmp_path))
    assert [r for r, _, _ in found] == rounds
    for round_, tree, meta in found:
        assert torch.equal(tree["b"], torch.full((2, 3), float(round_)))
        assert (meta["rank"], meta["round"]) == (2, round_)


def test_a_link_of_the_same_round_is_replaced(tmp_path: Path) -> None:
    chain(tmp_path, [1])
    append_link(tmp_path, 1, {"b": torch.zeros(1)}, {}, previous="")
    assert [tree["b"].numel() for _, tree, _ in read_links(tmp_path)] == [1]


def test_cut_links_removes_later_rounds_only(tmp_path: Path) -> None:
    chain(tmp_path, [1, 2, 3, 4])
    cut_links(tmp_path, 2)
    assert [r for r, _, _ in read_links(tmp_path)] == [1, 2]
    cut_links(tmp_path / "absent", 2)
    assert list(read_links(tmp_path / "absent")) == []


def of_others(folder: Path) -> None:
    save_file({"w": torch.ones(2)}, folder / CHECKPOINT)


def renamed(folder: Path) -> None:
    chain(folder, [1, 2])
    (folder / "000002.safetensors").rename(folder / "000005.safetensors")


def damaged(folder: Path) -> None:
    chain(folder, [1, 2])
    data = bytearray((folder / "000001.safetensors").read_bytes())
    data[-1] ^= 4
    (folder / "000001.safetensors").write_bytes(data)


# What is in a folder, what reads it, and key words of the error.
REFUSED: dict[str, tuple[Callable[[Path], object], Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, load_checkpoint, "no checkpoint .*safetensors.*resume"),
    "a file of others": (of_others, load_checkpoint, "not a checkpoint"),
    "a link of another round": (renamed, read_links, r"000005\.safetensors .*round 2"),
    "a damaged link": (damaged, read_links, r"000001\.safetensors.*damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_checkpoint_and_no_link_is_named(name: str, tmp_path: Path) -> None:
    write, read, why = REFUSED[name]
    write(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        list(read(tmp_path))  # type: ignore[call-overload]


leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers())
configs = st.recursive(
    st.dictionaries(st.sampled_from("abc"), leaves, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), leaves | inner, max_size=3),
    max_leaves=6,
)


@given(configs, configs)
def test_configs_differ_in_a_key_iff_they_are_not_equal(
    old: dict[str, object], new: dict[str, object]
) -> None:
    assert (config_difference(old, new) == []) == (flatten(old) == flatten(new))
    assert config_difference(old, old) == []


def test_difference_gives_a_line_per_key() -> None:
    old = {"method": {"name": "fed_rac_lora", "rank": 4}, "seed": 0, "data": {"labels": [1, 2]}}
    new = {"method": {"name": "fedavg"}, "seed": "0", "data": {"labels": [1]}, "clients": 5}
    assert config_difference(old, new) == [
        "clients: (absent) -> 5",
        "data.labels: [1,2] -> [1]",
        'method.name: "fed_rac_lora" -> "fedavg"',
        "method.rank: 4 -> (absent)",
        'seed: 0 -> "0"',
    ]


def test_flatten_keeps_empty_mappings_as_values() -> None:
    assert flatten({"a": {"b": {}, "c": [1]}, "d": {}}) == {"a.b": {}, "a.c": [1], "d": {}}


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = ({"a": torch.full((3,), float(i))} for i in range(2))
    path, read = tmp_path / "file.safetensors", files._read
    files.save_tensors(path, old, {}, sync=False)

    def between(where: Path) -> object:
        header, tensors, fits = read(where)
        if torch.equal(tensors["a"], new["a"]):
            return header, tensors, fits
        files.save_tensors(path, new, {}, sync=False)
        return header, read(where)[1], False  # the header of one and the data of the other

    monkeypatch.setattr(files, "_read", between)
    assert torch.equal(files.load_tensors(path, "")[0]["a"], new["a"])


def test_a_tensor_file_that_cannot_be_written_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library says it: in words, with the number of the system."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_tensors(tmp_path / "a.safetensors", {"W": torch.ones(2, 3)}, {}, sync=False)
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "a.safetensors"))
