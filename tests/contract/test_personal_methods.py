"""What a method promises whose clients keep a part of the model (`Traits.client_state`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import (
    RAGGED,
    World,
    assert_close_trees,
    assert_equal_trees,
    is_personal,
    label,
    make_method,
    play_rounds,
    run,
    variants,
)

from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.method import Draw
from fedraclora.tree import Tree

Variant = tuple[str, dict[str, Any]]
PERSONAL = [v for v in variants() if is_personal(v)]
ROUNDS, COHORT = 4, 3

every_personal = pytest.mark.parametrize("variant", PERSONAL, ids=label)


def held(world: World, variant: Variant, rounds: int, chunk: int = 2) -> dict[int, Tree]:
    """What each client has kept after some rounds."""
    method = make_method(variant[0], **variant[1])
    done = run(world, method, RAGGED, rounds=rounds, cohort=COHORT, chunk=chunk)
    return done.worker.store.latest(world.clients)


@every_personal
def test_what_stays_does_not_travel(variant: Variant, world: World) -> None:
    method = make_method(variant[0], **variant[1])
    for played in play_rounds(method, world, 3, Draw(17)):
        kept = {n for n, slot in played.sent.trained().items() if not slot.upload}
        assert kept
        assert not kept & set(played.uplinks.stack())
        assert not kept & set(played.after.carried)
        for slot in played.sent.trained().values():
            assert slot.upload or slot.numbers is None


@every_personal
def test_each_client_goes_on_from_its_own_and_from_nobody_elses(
    variant: Variant, world: World
) -> None:
    """A client that sits out keeps its tensors to the bit, and the others' never reach it."""
    before, after = held(world, variant, ROUNDS - 1), held(world, variant, ROUNDS)
    asked = set(draw_cohort(1, ROUNDS, world.clients, COHORT).tolist())
    rested = set(before) - asked
    assert rested
    for client in rested:
        assert_equal_trees(after[client], before[client])
    for client in asked & set(before):
        assert any(not torch.equal(t, before[client][n]) for n, t in after[client].items())
    own = list(after.values())
    assert not any(torch.equal(own[0][n], other[n]) for other in own[1:] for n in own[0])


@every_personal
def test_a_client_begins_with_what_it_kept(variant: Variant, world: World) -> None:
    method = make_method(variant[0], **variant[1])
    store = run(world, method, RAGGED, rounds=ROUNDS, cohort=COHORT).worker.store
    kept = store.latest(world.clients)
    clients = sorted(kept)
    blank = {n: torch.zeros_like(t) for n, t in kept[clients[0]].items()}
    found = store.read(torch.tensor(clients), ROUNDS + 1, blank)
    for place, client in enumerate(clients):
        assert_equal_trees({n: t[place] for n, t in found.items()}, kept[client])


@every_personal
def test_what_stays_does_not_depend_on_who_trains_beside(variant: Variant, world: World) -> None:
    """One after another or as one batch: a factor that ran on from client to client would show."""
    alone, together = (held(world, variant, ROUNDS, chunk) for chunk in (1, COHORT))
    assert alone.keys() == together.keys()
    for client, own in alone.items():
        assert_close_trees(together[client], own, 1e-11)


@every_personal
def test_a_client_that_is_new_has_the_model_of_the_server(variant: Variant, world: World) -> None:
    method, draw = make_method(variant[0], **variant[1]), Draw(17)
    played = play_rounds(method, world, 2, draw)[-1]
    new: Tree = {}
    for name, slot in played.sent.trained().items():
        if not slot.upload:
            assert slot.trained
            opening = slot.opening()
            new[name] = torch.zeros(slot.shape).double() if opening is None else opening
    found = method.weights(played.after, draw, new)
    assert_close_trees(found, method.weights(played.after, draw))


@every_personal
def test_what_is_sent_is_averaged_exactly(variant: Variant, world: World) -> None:
    method = make_method(variant[0], **variant[1])
    for played in play_rounds(method, world, 3, Draw(17)):
        shares = played.uplinks.weights / played.uplinks.weights.sum()
        for name, stacked in played.uplinks.stack().items():
            wanted = torch.tensordot(shares, stacked, dims=1)
            found = played.after.carried.get(name, played.after.base.get(name))
            assert found is not None
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
