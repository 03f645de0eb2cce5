"""What stays at the clients: two generations, rolled back where the server is behind."""

from __future__ import annotations

import pytest
import torch

from fedraclora.errors import ShapeError
from fedraclora.run.client_state import ClientStore
from fedraclora.tree import Tree

DEFAULT: Tree = {"head.weight": torch.zeros(2, 3), "head.bias": torch.ones(2)}


def values(*numbers: float) -> Tree:
    scale = torch.tensor(numbers)
    return {
        "head.weight": scale[:, None, None] * torch.ones(len(numbers), 2, 3),
        "head.bias": scale[:, None] * torch.ones(len(numbers), 2),
    }


def held(store: ClientStore, client: int, round_: int) -> float:
    return float(store.read(torch.tensor([client]), round_, DEFAULT)["head.weight"][0, 0, 0])


def test_a_client_that_holds_nothing_starts_from_the_default() -> None:
    read = ClientStore().read(torch.tensor([4, 9]), 1, DEFAULT)
    assert torch.equal(read["head.bias"], torch.ones(2, 2))


def test_a_client_reads_what_it_kept_and_no_other_does() -> None:
    store = ClientStore()
    store.stage(torch.tensor([2, 5]), 1, values(20, 50))
    assert [held(store, c, 2) for c in (2, 5, 3)] == [20, 50, 0]


def test_a_round_that_is_run_again_starts_from_before_it() -> None:
    store = ClientStore()
    store.stage(torch.tensor([2]), 1, values(1))
    store.stage(torch.tensor([2]), 3, values(3))
    assert held(store, 2, 3) == 1
    store.stage(torch.tensor([2]), 3, values(33))
    assert (held(store, 2, 3), held(store, 2, 4)) == (1, 33)


def test_two_generations_are_kept() -> None:
    store = ClientStore()
    for round_ in (1, 2, 3):
        store.stage(torch.tensor([0]), round_, values(round_))
    assert [held(store, 0, r) for r in (2, 3, 4)] == [0, 2, 3]


def test_what_is_kept_is_a_copy() -> None:
    store, kept = ClientStore(), values(7)
    store.stage(torch.tensor([0]), 1, kept)
    kept["head.weight"].zero_()
    assert held(store, 0, 2) == 7


def test_the_clients_that_trained_last_come_first() -> None:
    store = ClientStore()
    store.stage(torch.tensor([1, 7]), 1, values(1, 7))
    store.stage(torch.tensor([5]), 2, values(5))
    assert list(store.latest(2)) == [5, 1]
    assert float(store.latest(1)[5]["head.bias"][0]) == 5


def test_a_checkpoint_gives_both_generations_back() -> None:
    store, back = ClientStore(), ClientStore()
    store.stage(torch.tensor([3, 8]), 1, values(3, 8))
    store.stage(torch.tensor([8]), 2, values(88))
    back.restore(store.state())
    for client, round_ in [(3, 2), (8, 2), (8, 3)]:
        assert held(back, client, round_) == held(store, client, round_)
    assert list(back.latest(9)) == list(store.latest(9))


def test_an_empty_store_has_no_state() -> None:
    store = ClientStore()
    assert store.state() == {}
    store.restore({})
    assert store.latest(3) == {}


def test_numbers_of_other_tensors_are_not_handed_out() -> None:
    """As many numbers, under another name or in another shape: they are not what is asked."""
    store = ClientStore()
    store.stage(torch.tensor([2]), 1, values(20))
    for default in (
        {"tail.weight": torch.zeros(2, 3), "head.bias": torch.ones(2)},
        {"head.weight": torch.zeros(3, 2), "head.bias": torch.ones(2)},
    ):
        with pytest.raises(ShapeError, match=r"client 2: .*of round 1"):
            store.read(torch.tensor([2]), 2, default)
        assert torch.equal(store.read(torch.tensor([3]), 2, default)["head.bias"], torch.ones(1, 2))


def moments(name: str, link: int, *shape: int) -> Tree:
    first = {f"moments/first/{name}": torch.full((1, *shape), float(link))}
    return first | {"moments/steps": torch.ones(1), "moments/link": torch.full((1,), float(link))}


def test_moments_of_another_link_are_dropped_where_their_tensors_are_others() -> None:
    store, client = ClientStore(), torch.tensor([4])
    own = {"head.bias": torch.full((1, 2), 7.0)}
    store.stage(client, 1, own | moments("w/B", 3, 5, 2))
    blank = {n: torch.zeros(t.shape[1:]) for n, t in moments("w/A", 0, 2, 5).items()}
    default = {"head.bias": torch.ones(2)} | blank
    found = store.read(client, 2, default, link=4)
    assert torch.equal(found["head.bias"], own["head.bias"])
    assert not found["moments/first/w/A"].any()
    assert not found["moments/steps"].any()
    for link in (3, None):  # they have not ended
        with pytest.raises(ShapeError, match=r"first/w/B \(5, 2\), wanted is .*first/w/A \(2, 5\)"):
            store.read(client, 2, default, link=link)
    other = {"head.bias": torch.ones(3)} | blank
    with pytest.raises(ShapeError, match=r"head\.bias \(2,\), .*head\.bias \(3,\)"):
        store.read(client, 2, other, link=4)


def test_generations_of_unlike_tensors_come_back_from_a_checkpoint() -> None:
    """A round may be run again after what is trained has changed, at some clients before others."""
    store, back = ClientStore(), ClientStore()
    store.stage(torch.tensor([3]), 1, moments("w/B", 1, 5, 2))
    store.stage(torch.tensor([9]), 1, moments("w/B", 1, 5, 2))
    store.stage(torch.tensor([3]), 2, moments("w/A", 2, 2, 5))
    back.restore(store.state())
    part = ClientStore()
    part.absorb(store.part([3, 9], 3))
    for where in (store, back, part):
        for client, round_, name, shape in ((9, 3, "w/B", (5, 2)), (3, 3, "w/A", (2, 5))):
            blank = {n: torch.zeros(t.shape[1:]) for n, t in moments(name, 0, *shape).items()}
            found = where.read(torch.tensor([client]), round_, blank)
            wanted = moments(name, 2 if name == "w/A" else 1, *shape)
            assert all(torch.equal(found[n], t) for n, t in wanted.items())
    blank = {n: torch.zeros(t.shape[1:]) for n, t in moments("w/B", 0, 5, 2).items()}
    assert float(back.read(torch.tensor([3]), 2, blank)["moments/link"]) == 1
    assert list(back.latest(2)) == [3, 9]
