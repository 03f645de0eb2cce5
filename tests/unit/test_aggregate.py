"""Exact aggregation: fixed order, fixed blocks, float64."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.aggregation.base import AggregationContext, Mean, Total
from fedraclora.errors import ClientError, ShapeError
from fedraclora.protocol.method import Draw, RoundInstructions
from fedraclora.protocol.uplinks import (
    SUM_BLOCK,
    Refusal,
    RunningSum,
    Uplinks,
    block_sums,
    check_rows,
    failures_error,
    finite,
    weighted_sum,
)
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import Layout

cohorts = st.integers(1, 3 * SUM_BLOCK + 5)
LAYOUT = Layout((("w", (2, 3)), ("b", (1,))))


def cohort(K: int, P: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(0, "aggregate", K)
    scale = 10.0 ** torch.from_numpy(rng.uniform(-6, 6, (K, 1)))  # so that order matters
    return torch_normal(rng, K, P) * scale, torch.from_numpy(rng.uniform(0.1, 9.0, K))


def uplinks(K: int = 3) -> Uplinks:
    rows, weights = cohort(K, LAYOUT.size)
    return Uplinks(torch.arange(K), weights, LAYOUT, rows)


# --- sums ----------------------------------------------------------------------------------------


@given(cohorts)
def test_the_sum_is_the_dense_sum(K: int) -> None:
    rows, weights = cohort(K)
    found = weighted_sum(rows, weights)
    exact = [
        sum(
            (Fraction(float(w)) * Fraction(float(x)) for w, x in zip(weights, column, strict=True)),
            start=Fraction(0),
        )
        for column in rows.T
    ]
    size = (weights[:, None] * rows).abs().sum(dim=0)
    for value, wanted, bound in zip(found.tolist(), exact, size.tolist(), strict=True):
        assert abs(Fraction(value) - wanted) <= Fraction(bound) * Fraction(1, 10**12)


@given(cohorts)
def test_the_sum_is_taken_one_client_after_another_inside_fixed_blocks(K: int) -> None:
    rows, weights = cohort(K)
    total = torch.zeros(3, dtype=torch.float64)
    for first in range(0, K, SUM_BLOCK):
        block = torch.zeros(3, dtype=torch.float64)
        for k in range(first, min(first + SUM_BLOCK, K)):
            block = block + weights[k] * rows[k]
        total = total + block
    assert torch.equal(weighted_sum(rows, weights), total)


@given(cohorts, st.integers(1, 3))
def test_workers_that_hold_whole_blocks_change_no_bit(K: int, blocks: int) -> None:
    """Whatever number of blocks a worker sums, their concatenation is the server's own sums."""
    rows, weights = cohort(K)
    size = blocks * SUM_BLOCK
    parts = [block_sums(rows[i : i + size], weights[i : i + size]) for i in range(0, K, size)]
    assert torch.equal(torch.cat(parts), block_sums(rows, weights))
    assert block_sums(rows, weights).shape == (-(-K // SUM_BLOCK), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(cohorts, st.integers(1, 40), st.booleans(), st.integers(1, 4))
def test_a_running_sum_has_the_bits_of_the_sum(
    dtype: torch.dtype, K: int, chunk: int, counts: bool, cut: int
) -> None:
    rows, weights = cohort(K)
    rows, weights = rows.to(dtype), weights.mul(97).ceil() if counts else weights
    places = torch.arange(K) + torch.arange(K) // 3  # every fourth client is missing
    found = RunningSum(rows.shape[1])
    for i in range(0, K, chunk):
        found.add(
            rows[i : i + chunk].split(cut, dim=1), weights[i : i + chunk], places[i : i + chunk]
        )
    assert torch.equal(found.value(), weighted_sum(rows, weights, places))


def test_one_column_is_summed_as_it_is_among_others() -> None:
    rows, weights = cohort(70, 5)
    whole = weighted_sum(rows, weights)
    for i in range(5):
        assert torch.equal(weighted_sum(rows[:, i : i + 1], weights)[0], whole[i])


def test_float32_rows_are_widened_before_they_are_weighted() -> None:
    rows = torch.tensor([[1.0], [2.0**-30]], dtype=torch.float32)
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert float(weighted_sum(rows, weights)) == 1.0 + 2.0**-30
    third = torch.tensor([[3.0]], dtype=torch.float32)
    weight = torch.tensor([1.0 / 3.0], dtype=torch.float64)
    assert float(weighted_sum(third, weight)) == 1.0 / 3.0 * 3.0


def test_sums_do_not_touch_what_they_sum() -> None:
    rows, weights = cohort(40)
    kept = rows.clone(), weights.clone()
    weighted_sum(rows, weights)
    assert torch.equal(rows, kept[0])
    assert torch.equal(weights, kept[1])


# --- uplinks -------------------------------------------------------------------------------------


def test_the_mean_by_hand() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0, 0, 0, 2.0], [5.0, 0, 0, 0, 0, 0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    got = Uplinks(torch.tensor([4, 9]), weights, LAYOUT, rows)
    assert got.total == 4.0
    assert got.mean()["w"].tolist() == [[2, 0, 0], [0, 0, 0]]
    assert got.mean()["b"].tolist() == [2.5]
    assert got.stack()["w"].shape == (2, 2, 3)
    assert got.has_individuals


def test_the_mean_of_a_sum_is_the_mean_of_the_clients() -> None:
    got = uplinks(45)
    setting = AggregationContext(RoundInstructions(), 1, Draw(0))
    summed = Total()(got, setting)
    assert not summed.has_individuals
    assert all(torch.equal(summed.mean()[n], t) for n, t in got.mean().items())
    assert Total()(summed, setting) is summed
    assert Mean()(got, setting) is got
    with pytest.raises(ShapeError, match=r"each client's own update.* sum"):
        summed.stack()


def test_uplinks_without_numbers_are_refused() -> None:
    empty = Uplinks(torch.arange(2), torch.ones(2), LAYOUT)
    with pytest.raises(ShapeError, match=r"neither .*rows nor .*sum"):
        empty.mean()


# --- checks --------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        ("row", NAN, "local.lr or set local.clip"),
        ("row", -INF, "NaN or an infinity"),
        ("loss", NAN, "loss is nan; lower"),
        ("loss", INF, "training loss is inf"),
        ("weight", NAN, "its weight is nan"),
        ("weight", 0.0, "its weight is 0.0"),
        ("weight", -2.0, "its weight is -2.0"),
    ],
)
def test_a_client_that_cannot_be_summed_is_named(place: str, value: float, words: str) -> None:
    clients = torch.tensor([3, 8, 11])
    rows, weights = cohort(3)
    losses = torch.ones(3, dtype=torch.float64)
    {"row": rows[:, 1], "loss": losses, "weight": weights}[place][1] = value
    refused = check_rows(clients, weights, losses, [rows])
    assert [r.client for r in refused] == [8]
    assert words in refused[0].reason


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_refusal_names_the_tensor_that_is_not_finite(pieces: int) -> None:
    layout = Layout((("w/A", (2, 3)), ("w/B", (4, 1)), ("bias", (2,))))
    rows = torch.ones(2, layout.size)
    rows[1, 7] = INF  # w/B
    ones = torch.ones(2, dtype=torch.float64)
    columns = rows.split(layout.size // pieces, dim=1)
    refused = check_rows(torch.arange(2), ones, ones, columns, layout=layout)
    assert [r.client for r in refused] == [1]
    assert "w/B" in refused[0].reason


def test_clients_that_are_well_pass() -> None:
    rows, weights = cohort(3)
    assert check_rows(torch.arange(3), weights, torch.ones(3), rows.split(2, dim=1)) == []


def test_the_error_of_a_lost_round_names_round_clients_and_the_limit() -> None:
    error = failures_error([Refusal(7, "it is broken")], 12, "max_failures=0")
    assert isinstance(error, ClientError)
    said = str(error)
    assert all(part in said for part in ("round 12: 1 client", "max_failures=0", "client 7: it is"))
    many = failures_error([Refusal(i, "x") for i in range(9)], 3, "max_failures=2")
    assert "client 4: x (and 4 more)" in str(many)
    assert "client 5" not in str(many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_found(bad: float, dtype: torch.dtype) -> None:
    rows = torch.full((4, 77), float(torch.finfo(dtype).max), dtype=dtype)
    rows[2, 50] = bad
    rows[3, 0], rows[3, 1] = float("inf"), float("nan")
    assert finite(rows).tolist() == [True, True, False, False]
    assert finite(rows[:0]).tolist() == []
    assert finite(rows[:, :0]).tolist() == [True] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_with_whose_fourth_power_nothing_overflows_pass(
    bad: float, dtype: torch.dtype
) -> None:
    limit = float(torch.finfo(dtype).max) ** 0.25
    rows = torch.full((4, 77), limit / 16, dtype=dtype)  # of norm 0.55 times the limit
    rows[0, 3], rows[2, 50] = 1.1 * limit, bad
    rows[3, 0], rows[3, 1] = float("inf"), float("nan")
    ones = torch.ones(4, dtype=torch.float64)
    refused = check_rows(torch.arange(4), ones, ones, [rows])
    assert [r.client for r in refused] == [0, 2, 3]
    assert check_rows(torch.arange(4), ones, ones, [rows[:, :0]]) == []
