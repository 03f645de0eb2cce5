"""Which clients take part, and with which weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.errors import ConfigError
from fedraclora.protocol.cohorts import check_cohort, client_weights, draw_cohort


@given(st.integers(0, 2**31), st.integers(1, 500), st.data())
def test_a_cohort_is_a_sorted_set_of_clients(seed: int, clients: int, data: st.DataObject) -> None:
    cohort = data.draw(st.integers(1, clients))
    drawn = draw_cohort(seed, 3, clients, cohort)
    ids = drawn.tolist()
    assert drawn.dtype == torch.int64
    assert ids == sorted(set(ids))
    assert len(ids) == cohort
    assert set(ids) <= set(range(clients))
    assert torch.equal(drawn, draw_cohort(seed, 3, clients, cohort))


def test_rounds_and_seeds_draw_apart() -> None:
    drawn = [tuple(draw_cohort(s, t, 1000, 10).tolist()) for s in range(3) for t in range(1, 4)]
    assert len(set(drawn)) == 9


def test_every_client_has_the_same_chance() -> None:
    counts = torch.zeros(10)
    for round_ in range(1, 2001):
        counts[draw_cohort(0, round_, 10, 3)] += 1
    # Each client is drawn Binomial(2000, 0.3) times: five standard deviations are 102.
    assert float((counts - 600).abs().max()) < 102


@pytest.mark.parametrize(("cohort", "clients"), [(0, 5), (6, 5), (-1, 5), (1, 0)])
def test_a_cohort_that_cannot_be_drawn_is_refused(cohort: int, clients: int) -> None:
    with pytest.raises(ConfigError, match=f"clients_per_round={cohort}.*choose 1 to {clients}"):
        check_cohort(cohort, clients)


@pytest.mark.parametrize(("cohort", "clients"), [(1, 1), (1, 5), (5, 5)])
def test_other_cohorts_pass(cohort: int, clients: int) -> None:
    check_cohort(cohort, clients)


def test_weights_are_examples_or_ones_in_float64() -> None:
    samples = torch.tensor([3, 1, 2**40])
    assert client_weights("samples", samples).tolist() == [3.0, 1.0, 2.0**40]
    assert client_weights("uniform", samples).tolist() == [1.0, 1.0, 1.0]
    assert client_weights("samples", samples).dtype == torch.float64
