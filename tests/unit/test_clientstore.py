"""What stays at the clients: two generations, rolled back where the server is behind."""

from __future__ import annotations

import pytest
import torch

from fedraclora.clientstore import ClientStore
from fedraclora.errors import ShapeError
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
        with pytest.raises(ShapeError, match=r"from earlier rounds, but in round 2 .* is asked"):
            store.read(torch.tensor([2]), 2, default)
