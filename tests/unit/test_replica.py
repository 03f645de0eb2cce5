"""A replica follows the server's weights by updates, and serves no other version than it holds."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedraclora.errors import WireError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree, digest
from fedraclora.weights.chain import CatchUp
from fedraclora.weights.files import load_tensors
from fedraclora.weights.replica import (
    Replica,
    StoredReplica,
    changed_file,
    read_stored_replica,
)
from fedraclora.weights.update import BaseWeights, WeightHistory, WeightUpdate


def test_a_replica_gives_the_weights_of_its_version_without_a_copy() -> None:
    base, later = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    held = BaseWeights(base)
    assert held.at(0, 1) is base
    held.publish(later, 3)
    assert held.at(3, 4) is later


@pytest.mark.parametrize("version", [0, 2, 4])
def test_another_version_is_refused_with_round_and_both_versions(version: int) -> None:
    held = BaseWeights({}, 3)
    with pytest.raises(WireError) as caught:
        held.at(version, 7)
    text = str(caught.value)
    assert "round 7" in text
    assert "holds version 3" in text
    assert f"asks for {version}" in text


# --- updates -------------------------------------------------------------------------------------

PLAN = Plan({"w": LayerView("linear", (6, 8)), "v": LayerView("conv1d", (6, 8))})
CPU = torch.device("cpu")


def first() -> Tree:
    rng = generator(0, "w")
    return {
        "w": torch_normal(rng, 6, 8).float(),
        "v": torch_normal(rng, 8, 6).float(),
        "b": torch_normal(rng, 6).float(),
    }


def term(seed: int, rank: int = 1) -> Term:
    """By rank 1 it has 14 numbers, where the weight has 48."""
    rng = generator(seed, "link")
    return Term.of((torch_normal(rng, 6, rank).float(), torch_normal(rng, rank, 8).float()), 1.5)


def derived(i: int) -> Term:
    """By turns right and left, the frozen factor computed from what the last link trained."""
    label, shape = ("B", (6, 1)) if i % 2 else ("A", (1, 8))
    trained = torch_normal(generator(i, "derived"), *shape).float()
    side, dim = ("right", 8) if label == "B" else ("left", 6)
    drawing = SketchSpec("gaussian", side, 1, dim, seed=1, index=i)
    frozen = Factor(sketch=drawing)
    if i > 1:
        frozen = Factor(sketch=drawing, coefficients=torch.tensor([[0.5, -1.5 * i]]).double())
    factors = (trained, frozen) if label == "B" else (frozen, trained)
    return Term.of(factors, 1.5, keep="BA".index(label))


SKETCH = Term.of((torch.ones(6, 2), SketchSpec("gaussian", "right", 2, 8, seed=1, index=0)), 0.5)
LINKS: dict[str, Callable[[int], Link | None]] = {
    "terms": lambda i: Link({"w": term(i), "v": term(-i)}),
    "large": lambda i: Link({"w": term(i, 5), "v": term(i)}),
    "sketches": lambda i: Link({"w": SKETCH}),
    "derived": lambda i: Link({"w": derived(i)}),
    "derived, whole now and then": lambda i: (
        Link({"w": derived(i)})
        if i % 3
        else Link({}, {"w": first()["w"] * i, "w/past": derived(i).factors[1 - i % 2].draw()})
    ),
    "dense": lambda i: Link({"w": term(i)}, {"b": torch.full((6,), 1.0 * i)}),
    "whole now and then": lambda i: Link({"v": term(i)}, {"w": first()["w"] * i} if i % 2 else {}),
    "rest": lambda i: Link({"w": term(i)}, {}, (Link({"w": term(-i), "v": term(i)}),)),
    "rest with dense": lambda i: Link({"v": term(i)}, {}, (Link({}, {"b": torch.ones(6) * i}),)),
    "nothing now and then": lambda i: Link({"w": term(i)}) if i % 3 else None,
}


def history(kind: str, versions: int, start: int = 0, into: WeightHistory | None = None) -> Tree:
    """Publish a version and the ones that follow from it; give the last weights."""
    told, base = WeightHistory() if into is None else into, first()
    told.publish(base, start)
    for i in range(1, versions + 1):
        link = LINKS[kind](i)
        base = base if link is None else apply_link(base, link, PLAN)
        told.publish(base, start + i, link)
    return base


def told(kind: str, versions: int, start: int = 0) -> WeightHistory:
    found = WeightHistory()
    history(kind, versions, start, found)
    return found


def follower(version: int, kind: str) -> Replica:
    replica = Replica(PLAN, CPU)
    assert replica.follow(told(kind, version).since(None))
    return replica


@pytest.mark.parametrize("kind", LINKS)
@pytest.mark.parametrize("held", range(8))
def test_an_update_leads_from_any_version_to_the_newest(kind: str, held: int) -> None:
    """Of each weight by links or whole, and in the bytes that `CatchUp` counts for it."""
    server, replica, counted = told(kind, 7), follower(held, kind), CatchUp(first(), 1)
    for i in range(1, 8):
        counted.add(LINKS[kind](i))
        counted.versions[0] = min(i, held)
    update = pickle.loads(pickle.dumps(server.since(held)))
    assert update.start == held
    assert update.payload_bytes == counted.missing(torch.tensor([0])).sum()
    assert update.payload_bytes <= server.since(None).payload_bytes
    assert replica.follow(update)
    assert digest(replica.at(7, 8)) == digest(server.base)
    assert all(t.data_ptr() % 64 == 0 for t in update.dense.values())


def test_only_terms_that_are_together_smaller_than_their_weight_are_kept() -> None:
    """48 numbers are more than three times 14 and less than four times."""
    server = told("terms", 50)
    assert [v for v, _ in server.since(0).links] == []
    assert [v for v, _ in server.since(47).links] == [48, 49, 50]
    assert [bool(link.terms) for link in server._links] == [False, True, True, True]


def test_a_weight_that_was_replaced_goes_whole_and_the_others_by_links() -> None:
    update = told("whole now and then", 7).since(4)
    assert set(update.dense) == {"w"}
    assert {n for _, link in update.links for n in link.terms} == {"v"}
    assert not any(link.dense for _, link in update.links)


@pytest.mark.parametrize("held", [None, -1, 3, 8])
def test_whoever_holds_nothing_or_another_past_gets_the_weights(held: int | None) -> None:
    """A run that went on at version 5 knows no link before."""
    server = told("terms", 2, start=5)
    update = server.since(held)
    assert (update.start, update.links, set(update.dense)) == (None, (), set(first()))
    replica = follower(3, "terms")
    assert replica.follow(update)
    assert digest(replica.at(7, 8)) == digest(server.base)


def test_a_history_that_is_recalled_leads_on_from_the_first_version() -> None:
    server, again = told("rest", 5), WeightHistory()
    again.recall(server.base, ((i, LINKS["rest"](i) or Link()) for i in (1, 2, 3, 4, 5)), 6)
    again.publish(server.base, 6)  # as a run does that goes on
    assert (again.oldest, again.version) == (0, 6)
    replica = follower(4, "rest")
    update = again.since(4)
    assert update.links
    assert replica.follow(update)
    assert digest(replica.at(6, 7)) == digest(server.base)


def test_versions_that_were_left_out_end_the_links() -> None:
    server = told("terms", 1)
    server.publish(server.base, 4, LINKS["terms"](9))
    assert server.oldest == 4
    assert server.since(1).start is None


def test_a_replica_that_is_ahead_takes_the_links_that_are_new_to_it() -> None:
    server, replica = told("terms", 3), follower(2, "terms")
    assert replica.follow(server.since(1))
    assert digest(replica.at(3, 4)) == digest(server.base)
    assert not replica.follow(told("terms", 2).since(1))  # and none that lead back
    assert replica.version == 3


def test_a_replica_that_drifted_asks_for_the_weights() -> None:
    server, replica = told("terms", 2), follower(1, "terms")
    replica.base = {**replica.base, "w": replica.base["w"] + 1e-6}
    assert not replica.follow(server.since(1))
    assert replica.version == 1  # nothing was taken over
    assert replica.follow(server.since(None))
    assert digest(replica.at(2, 3)) == digest(server.base)


def test_weights_that_came_damaged_are_refused() -> None:
    server = told("terms", 1)
    update = server.since(None)
    harmed = {n: t + 1 for n, t in update.dense.items()}
    with pytest.raises(WireError, match=r"version 1 .*was damaged"):
        Replica(PLAN, CPU).follow(WeightUpdate(1, update.mark, None, dense=harmed))


def test_what_is_stored_is_found_again_and_followed_on(tmp_path: Path) -> None:
    stored = StoredReplica(tmp_path, PLAN, CPU)
    assert stored.follow(told("terms", 2).since(None))
    again = StoredReplica(tmp_path, PLAN, CPU)
    assert (again.version, again.mark) == (2, stored.mark)
    assert again.follow(told("terms", 3).since(2))
    assert digest(StoredReplica(tmp_path, PLAN, CPU).at(3, 4)) == digest(told("terms", 3).base)


def test_what_has_changed_lies_beside_the_rest_and_never_beside_another(tmp_path: Path) -> None:
    base = {**first(), "u": torch.ones(200)}
    stored = StoredReplica(tmp_path, PLAN, CPU)
    stored.take(base, 1, 11)
    stored.take(base | {"b": base["b"] + 1}, 2, 12)
    again = StoredReplica(tmp_path, PLAN, CPU)
    again.take(again.base | {"w": base["w"] + 1}, 3, 13)
    assert set(load_tensors(changed_file(tmp_path), "")[0]) == {"b", "w"}
    known = read_stored_replica(tmp_path)
    assert known is not None
    assert known[1:] == (3, 13)
    assert digest(known[0]) == digest(base | {"b": base["b"] + 1, "w": base["w"] + 1})
    again.take({n: t + 2 for n, t in base.items()}, 4, 14)  # a kill may leave the older file
    found = read_stored_replica(tmp_path)
    assert found is not None
    assert (digest(found[0]), found[1]) == (digest({n: t + 2 for n, t in base.items()}), 4)
    again.take(again.base | {"b": base["b"]}, 5, 15)
    changed_file(tmp_path).write_bytes(changed_file(tmp_path).read_bytes()[:-1])
    assert read_stored_replica(tmp_path) is None  # as if nothing were there
