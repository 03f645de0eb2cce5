"""The schedule of a chunk: what each client sees, and that no more is drawn than they see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.rng import cohort_permutations, hash_key
from fedraclora.training import schedule
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.schedule import Schedule
from tests.reference.client import batches


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([0, 1, 7, 50]),
    st.sampled_from([{"epochs": 1}, {"epochs": 3}, {"steps": 1}, {"steps": 11}]),
    st.booleans(),
)
def test_a_client_among_others_sees_what_it_sees_alone(
    counts: list[int], batch: int, length: dict[str, int], shuffle: bool
) -> None:
    local = LocalConfig(lr=0.1, batch_size=batch, shuffle=shuffle, **length)
    clients = 3 + 5 * torch.arange(len(counts))
    key = hash_key(9, "shuffle", 4)
    found = Schedule.of(clients, torch.tensor(counts), local, key)
    for k, (client, size) in enumerate(zip(clients.tolist(), counts, strict=True)):
        wanted = batches(size, client, local, 9, 4)
        assert int(found.steps[k]) == len(wanted)
        for step, rows in enumerate(wanted):
            seen = found.positions[k, step][found.valid[k, step]]
            assert torch.equal(seen, rows)
        assert not found.valid[k, len(wanted) :].any()


@pytest.mark.parametrize("length", [{"epochs": 1}, {"steps": 60}])
def test_a_small_client_beside_a_large_one_draws_only_its_own_shuffles(
    length: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 epochs of a client of two samples, or one of it beside 60 steps, cost what they hold."""
    drawn: list[int] = []

    def counted(
        key: int, clients: torch.Tensor, sizes: torch.Tensor, epoch: int | torch.Tensor
    ) -> torch.Tensor:
        shuffles = cohort_permutations(key, clients, sizes, epoch)
        drawn.append(shuffles.numel())
        return shuffles

    monkeypatch.setattr(schedule, "cohort_permutations", counted)
    clients, sizes = torch.arange(3), torch.tensor([2, 3, 600])
    local = LocalConfig(lr=0.1, batch_size=10, **length)
    Schedule.of(clients, sizes, local, hash_key(0, "shuffle", 1))
    assert sum(drawn) <= 3 * 600 + 60 * 2 * 3
