"""A replica serves the version that it holds or finds, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedraclora.errors import WireError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import Tree, digest
from fedraclora.weights.replica import FileReplica, Follower, Replica, VersionLog


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


# --- followers -----------------------------------------------------------------------------------

PLAN = Plan({"w": LayerView("linear", (6, 8))})
CPU = torch.device("cpu")


def link_of(seed: int) -> Link:
    """28 numbers, where the weight has 48."""
    rng = generator(seed, "link")
    return Link({"w": Term((torch_normal(rng, 6, 2), torch_normal(rng, 2, 8)), 1.5)})


def told(versions: int, first: int = 0) -> VersionLog:
    """A chronicle that began at ``first`` and has had so many links since."""
    chronicle, base = VersionLog(), {"w": torch_normal(generator(0, "w"), 6, 8).float()}
    chronicle.publish(base, first)
    for seed in range(versions):
        base = apply_link(base, link_of(seed), PLAN)
        chronicle.publish(base, first + seed + 1, link_of(seed))
    return chronicle


def test_a_follower_that_is_one_link_behind_gets_the_link_alone() -> None:
    follower = Follower(PLAN, CPU)
    assert follower.follow(told(1).since(None))
    news = told(2).since(1)
    assert news.dense is None
    assert news.links is not None
    assert len(news.links) == 1
    assert follower.follow(news)
    assert digest(follower.at(2, 3)) == digest(told(2).base)


@pytest.mark.parametrize("held", [None, 0, 3])
def test_whoever_holds_nothing_or_another_past_gets_the_weights(held: int | None) -> None:
    """Two links are larger than the weight, and a run that went on knows no link before."""
    news = told(2, first=5 if held == 3 else 0).since(held)
    assert news.links is None
    follower = Follower(PLAN, CPU)
    assert follower.follow(news)
    assert digest(follower.base) == digest(told(2).base)


def test_versions_that_were_left_out_end_the_links() -> None:
    chronicle = told(1)
    chronicle.publish(chronicle.base, 4, link_of(9))
    assert chronicle.oldest == 4
    assert chronicle.since(1).links is None


def test_a_follower_that_drifted_asks_for_the_weights() -> None:
    follower = Follower(PLAN, CPU)
    assert follower.follow(told(1).since(None))
    follower.base = {"w": follower.base["w"] + 1e-6}
    assert not follower.follow(told(2).since(1))
    assert follower.version == 1  # nothing was taken over
    assert follower.follow(told(2).since(None))
    assert digest(follower.at(2, 3)) == digest(told(2).base)


def test_weights_that_came_damaged_are_refused() -> None:
    news = told(1).since(None)
    assert news.dense is not None
    news.dense["w"][0, 0] += 1
    with pytest.raises(WireError, match="version 1 of the base weights came damaged"):
        Follower(PLAN, CPU).follow(news)
