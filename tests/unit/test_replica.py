"""A replica serves the version that it holds or finds, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedraclora.errors import WireError
from fedraclora.replica import FileReplica, Replica
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import Tree, digest


def test_a_replica_gives_the_weights_of_its_version_without_a_copy() -> None:
    base, later = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    replica = Replica(base)
    assert replica.at(0, 1) is base
    replica.publish(later, 3)
    assert replica.at(3, 4) is later


@pytest.mark.parametrize("version", [0, 2, 4])
def test_another_version_is_refused_with_round_and_both_versions(version: int) -> None:
    replica = Replica({}, 3)
    with pytest.raises(WireError) as caught:
        replica.at(version, 7)
    text = str(caught.value)
    assert "round 7" in text
    assert "holds version 3" in text
    assert f"asks for {version}" in text


def weights(seed: int) -> Tree:
    rng = generator(seed, "test")
    return {
        "w": torch_normal(rng, 5, 3).t(),  # not contiguous
        "b": torch_normal(rng, 3).float(),
        "a": torch_normal(rng, 1, 7),
    }


def test_another_process_finds_the_published_version(tmp_path: Path) -> None:
    server, reader = FileReplica(tmp_path), FileReplica(tmp_path)
    for version in (0, 1, 4):
        base = weights(version)
        server.publish(base, version)
        found = reader.at(version, version + 1)
        assert digest(found) == digest(base)
        assert list(found) == list(base)
        assert reader.at(version, version + 2) is found  # read once


def test_what_is_read_is_aligned_as_torch_allocates_it(tmp_path: Path) -> None:
    # Matrix products of tensors at odd addresses differ in the last bit.
    FileReplica(tmp_path).publish(weights(0), 0)
    assert all(t.data_ptr() % 64 == 0 for t in FileReplica(tmp_path).at(0, 1).values())


def test_the_newest_version_alone_is_kept(tmp_path: Path) -> None:
    server = FileReplica(tmp_path)
    server.publish(weights(0), 0)
    held = FileReplica(tmp_path)
    before = held.at(0, 1)
    server.publish(weights(1), 1)
    assert [p.name for p in tmp_path.iterdir()] == ["000001.safetensors"]
    assert held.at(0, 1) is before  # what a process holds it can still serve
    with pytest.raises(WireError, match=r"round 1: .* does not hold version 0"):
        FileReplica(tmp_path).at(0, 1)


def test_a_damaged_file_is_not_trained_on(tmp_path: Path) -> None:
    FileReplica(tmp_path).publish(weights(0), 0)
    (path,) = tmp_path.iterdir()
    flipped = bytearray(path.read_bytes())
    flipped[-5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(WireError, match=r"round 1: version 0 .* damaged"):
        FileReplica(tmp_path).at(0, 1)
