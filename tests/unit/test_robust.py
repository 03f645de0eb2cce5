"""Robust rules against their definitions, and what attackers can do to them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.aggregation.base import AggregationContext, Aggregator, Mean
from fedraclora.aggregation.robust import (
    AGGREGATORS,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
    krum_order,
    median,
    share_of,
    shortened,
    trimmed_mean,
)
from fedraclora.errors import ConfigError, ShapeError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import Adapter, RoundInstructions
from fedraclora.protocol.method import Draw
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Layout

RULES = (Median(), TrimmedMean(), GeometricMedian(), Krum(), MultiKrum(), NormBound(0.5))
LAYOUT = Layout((("w/B", (2, 3)), ("b", (1,))))
DOWNLINK = RoundInstructions(
    {
        "w": Adapter.of(
            {
                "B": to_train((2, 3), torch.full((2, 3), 0.25)),
                "A": SketchSpec("orthonormal", "right", 3, 5, seed=1, index=0),
            },
            scale=5 / 3,
        )
    },
    {"b": to_train((1,), main=False)},
)
SETTING = AggregationContext(DOWNLINK, 1, Draw(0), {"b": torch.tensor([-2.0])})
WEISZFELD = GeometricMedian(smoothing=1e-9, tolerance=1e-15, iterations=2000)


def normals(seed: int, *shape: int) -> torch.Tensor:
    """float64 normals."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uplinks(rows: torch.Tensor) -> Uplinks:
    """Rows of clients of unequal weights."""
    K = len(rows)
    weights = torch.arange(1, K + 1, dtype=torch.float64)
    return Uplinks(torch.arange(K) * 3, weights, LAYOUT, rows)


def found(rule: Aggregator, rows: torch.Tensor) -> torch.Tensor:
    """The vector that a method takes for the mean."""
    return LAYOUT.pack(rule(uplinks(rows), SETTING).mean())


# --- definitions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [5, 6])
def test_median_and_trimmed_mean_by_sorted_lists(K: int) -> None:
    rows = normals(1, K, 4)
    for p, column in enumerate(rows.T.tolist()):
        ranked = sorted(column)
        middle = ranked[(K - 1) // 2 : K // 2 + 1]
        assert float(median(rows)[p]) == pytest.approx(sum(middle) / len(middle), rel=1e-14)
        kept = ranked[2 : K - 2]
        assert float(trimmed_mean(rows, 2)[p]) == pytest.approx(sum(kept) / len(kept), rel=1e-14)
    assert torch.equal(trimmed_mean(rows, 0), rows.sort(dim=0).values.mean(dim=0))


def test_the_geometric_median_is_where_unit_pulls_balance() -> None:
    """At the minimum of sum ||z - x_i|| the unit vectors to the points add up to zero."""
    rows = normals(2, 7, 3)
    point = WEISZFELD.estimate(rows)
    gaps = rows - point
    units = gaps / gaps.norm(dim=1, keepdim=True)
    assert float(units.sum(dim=0).norm()) < 1e-6
    least = float(gaps.norm(dim=1).sum())
    for other in normals(3, 50, 3) * 0.1 + point:
        assert float((rows - other).norm(dim=1).sum()) >= least


def test_the_geometric_median_of_a_triangle_is_known() -> None:
    """Equilateral: the centre. With an angle of more than 120 degrees: that corner."""
    corners = torch.tensor([[0.0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
    centre = WEISZFELD.estimate(corners)
    torch.testing.assert_close(centre, corners.mean(dim=0), rtol=0, atol=1e-7)
    flat = torch.tensor([[-1.0, 0], [0, 0.1], [1, 0]], dtype=torch.float64)
    corner = WEISZFELD.estimate(flat)
    torch.testing.assert_close(corner, flat[1], rtol=0, atol=1e-6)


def test_krum_by_brute_force() -> None:
    """The score is the least sum of squared distances to any K - f - 2 others."""
    rows, f = normals(4, 9, 7), 2
    scores = []
    for i in range(9):
        apart = [float((rows[i] - rows[j]).square().sum()) for j in range(9) if j != i]
        scores.append(min(sum(some) for some in combinations(apart, 9 - f - 2)))
    wanted = sorted(range(9), key=scores.__getitem__)
    assert krum_order(rows, f).tolist() == wanted
    assert torch.equal(found(Krum(attackers=2), rows), rows[wanted[0]])
    for kept, rule in ((4, MultiKrum(2, kept=4)), (7, MultiKrum(2))):
        mean = rows[wanted[:kept]].mean(dim=0)
        torch.testing.assert_close(found(rule, rows), mean, rtol=1e-14, atol=1e-14)


def test_updates_are_shortened_from_where_they_started() -> None:
    rows = normals(5, 6, 7)
    start = torch.cat([torch.full((6,), 0.25), torch.tensor([-2.0])]).double()
    rows[2] = start + 0.01
    got = NormBound(0.5)(uplinks(rows), SETTING)
    assert got.stacked is not None
    assert torch.equal(got.weights, uplinks(rows).weights)
    norms = (got.stacked - start).norm(dim=1)
    assert torch.equal(got.stacked[2], rows[2])
    torch.testing.assert_close(norms[[0, 1, 3, 4, 5]], torch.full((5,), 0.5).double())
    cosine = torch.cosine_similarity(got.stacked - start, rows - start)
    torch.testing.assert_close(cosine, torch.ones(6).double())


def test_a_start_of_each_client_is_its_own() -> None:
    starts = normals(6, 4, 2, 3)
    sent = RoundInstructions(
        {"w": Adapter.of({"B": to_train((2, 3), starts)}, 1.0)}, DOWNLINK.dense
    )
    rows = torch.cat([starts.reshape(4, -1), torch.full((4, 1), -2.0).double()], dim=1)[[0, 2, 3]]
    got = Uplinks(
        torch.tensor([1, 5, 8]),
        torch.ones(3).double(),
        LAYOUT,
        rows + torch.eye(3, 7).double(),
        places=torch.tensor([0, 2, 3]),
    )
    bounded = NormBound(0.5)(got, AggregationContext(sent, 1, Draw(0), {"b": torch.tensor([-2.0])}))
    assert bounded.stacked is not None
    torch.testing.assert_close(bounded.stacked, rows + torch.eye(3, 7).double() / 2)


# --- laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@given(seed=st.integers(0, 10**6), K=st.integers(7, 12))
def test_the_order_of_clients_is_irrelevant(rule: Aggregator, seed: int, K: int) -> None:
    rows = normals(seed, K, 7)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    got = uplinks(rows)
    mixed = Uplinks(got.clients[order], got.weights[order], LAYOUT, rows[order])
    again = LAYOUT.pack(rule(mixed, SETTING).mean())
    torch.testing.assert_close(again, found(rule, rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", [r for r in RULES if r.name != "norm_bound"], ids=lambda r: r.name)
def test_a_claimed_weight_counts_for_nothing(rule: Aggregator) -> None:
    rows = normals(7, 9, 7)
    got = uplinks(rows)
    boast = Uplinks(got.clients, got.weights.clone(), LAYOUT, rows)
    boast.weights[3] = 1e12
    wanted, again = found(rule, rows), LAYOUT.pack(rule(boast, SETTING).mean())
    torch.testing.assert_close(again, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [Median(), TrimmedMean(3), GeometricMedian(), Krum(3), MultiKrum(3)],
    ids=lambda r: r.name,
)
@given(seed=st.integers(0, 10**6), size=st.floats(1e2, 1e9))
def test_attackers_below_the_breakdown_point_move_nothing_far(
    rule: Aggregator, seed: int, size: float
) -> None:
    """3 of 11, as far away as they like, alike or not: the result stays among the honest ones."""
    honest, towards = normals(seed, 8, 7), normals(seed + 1, 3, 7)
    for bad in (size * towards, size * towards[:1].expand(3, -1)):
        result = found(rule, torch.cat([honest, bad]))
        assert float((result - honest.mean(dim=0)).norm()) < 3 * float(honest.norm(dim=1).max())
        plain = found(Mean(), torch.cat([honest, bad]))
        assert float((plain - honest.mean(dim=0)).norm()) > 0.05 * size * float(bad[0].norm() > 1)


@given(seed=st.integers(0, 10**6))
def test_coordinates_lie_between_honest_ones(seed: int) -> None:
    honest = normals(seed, 7, 5)
    rows = torch.cat([honest, 1e6 * normals(seed + 1, 3, 5)])
    for vector in (median(rows), trimmed_mean(rows, 3)):
        assert bool((vector >= honest.min(dim=0).values).all())
        assert bool((vector <= honest.max(dim=0).values).all())


def test_distances_of_factors_are_those_of_weights_under_an_orthonormal_sketch() -> None:
    factors = normals(8, 6, 4, 3)
    for kind, exact in (("orthonormal", True), ("gaussian", False)):
        A = SketchSpec(kind, "right", 3, 11, seed=4, index=0).draw().double()
        weights = torch.cdist((factors @ A).flatten(1), (factors @ A).flatten(1))
        ratio = (weights / torch.cdist(factors.flatten(1), factors.flatten(1)))[
            ~torch.eye(6, dtype=torch.bool)
        ]
        assert bool(torch.allclose(ratio, torch.ones_like(ratio))) == exact
        values = torch.linalg.svdvals(A)
        assert bool(((ratio > values[-1] - 1e-9) & (ratio < values[0] + 1e-9)).all())


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "cohort", "words"),
    [
        (Krum(2), 6, r"2 attackers .*7 clients .*6 answered"),
        (MultiKrum(0.4), 9, "4 attackers among 11 clients"),
        (TrimmedMean(3), 6, r"out 3 clients .*6 answered"),
    ],
)
def test_too_small_a_cohort_is_refused(rule: Aggregator, cohort: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rule.check(cohort)
    rule.check(20)
    with pytest.raises(ConfigError, match=words):
        rule(uplinks(normals(9, cohort, 7)), SETTING)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_what_makes_one_vector_says_so(name: str) -> None:
    """By this a method that needs each client's own update is refused beside it."""
    got = AGGREGATORS[name]()(uplinks(normals(9, 20, 7)), SETTING)
    assert AGGREGATORS[name].estimates == (got.stacked is None)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_sum_cannot_be_looked_into(rule: Aggregator) -> None:
    got = uplinks(normals(9, 9, 7))
    summed = Uplinks(got.clients, got.weights, LAYOUT, summed=got.sum())
    with pytest.raises(ShapeError, match="only their sum came"):
        rule(summed, SETTING)


@pytest.mark.parametrize("attackers", [-1, 0.5, 1.5, float("nan")])
def test_impossible_numbers_of_attackers_are_refused(attackers: float) -> None:
    for rule in (TrimmedMean, Krum, MultiKrum):
        with pytest.raises(ConfigError, match=f"aggregator.attackers={attackers}"):
            rule(attackers)


def test_other_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"aggregator\.kept=0"):
        MultiKrum(kept=0)
    with pytest.raises(ConfigError, match=r"aggregator\.bound=inf"):
        NormBound(float("inf"))
    with pytest.raises(ConfigError, match=r"aggregator\.tolerance=0"):
        GeometricMedian(tolerance=0.0)


def test_a_share_is_rounded_up_and_not_by_a_last_bit() -> None:
    assert [share_of(30, 0.1), share_of(100, 0.29), share_of(7, 0.2), share_of(7, 0)] == [
        3,
        29,
        2,
        0,
    ]


def test_rows_within_the_bound_keep_their_bits() -> None:
    rows = normals(10, 5, 7) * 0.1
    assert torch.equal(shortened(rows, torch.zeros(7).double(), 10.0), rows)
