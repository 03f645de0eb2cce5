"""What a method keeps is stored by the names of its fields, and read from them."""

from __future__ import annotations

import pytest

from fedraclora.protocol.method import Counters
from fedraclora.strategies.wrappers.allocated import Chosen
from fedraclora.strategies.wrappers.pruned import PruningState

STORED = [
    (Counters(4, 1), {"sketch": 4, "age": 1}),
    (
        PruningState(2, 5, {"a.weight": 3, "b/c": 0}, components=6, rounds=7),
        {"sketch": 2, "age": 5, "rank/a.weight": 3, "rank/b/c": 0, "components": 6, "rounds": 7},
    ),
    (
        Chosen(1, 0, {"a.weight": 1, "b/c": 0}),
        {"sketch": 1, "age": 0, "adapted/a.weight": 1, "adapted/b/c": 0},
    ),
]


@pytest.mark.parametrize(("counters", "stored"), STORED, ids=["links", "ranks", "layers"])
def test_numbers_are_stored_and_read_by_the_names_of_their_fields(
    counters: Counters, stored: dict[str, int]
) -> None:
    assert counters.stored() == stored
    assert type(counters).read(stored) == counters


def test_what_a_file_lacks_is_as_at_the_start_and_foreign_names_are_left_out() -> None:
    assert Counters.read({}) == Counters()
    assert PruningState.read({"rank/w": 2, "components": 2, "x": 1}) == PruningState(
        rank={"w": 2}, components=2
    )
