"""Rank budgets: which numbers of a factor they leave, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.compatibility import Features
from fedraclora.devices.distributions import Constant
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError, ShapeError, WireError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Cohort, Draw, Plan, RoundInstructions
from fedraclora.protocol.rank_budgets import (
    check_budgets,
    cut_gradients,
    hold,
    rank_axes,
    trainable,
    uploaded_mask,
    uploaded_numbers,
    widen,
    within,
)
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg

M, R, N = 5, 3, 7
RANKS = torch.tensor([1, 3, 2, 9])
A = SketchSpec("gaussian", "right", R, N, 0, 0)


def right(**settings: object) -> RoundInstructions:
    """Two adapters, one of a lower rank, and a head."""
    low = Adapter.of({"B": to_train((M, 2)), "A": torch.ones(2, N)}, 1.0)
    return RoundInstructions(
        {"w": Adapter.of({"B": to_train((M, R)), "A": A}, 1.0), "low": low},
        {"head": to_train((4, M))},
        **settings,  # type: ignore[arg-type]
    )


def test_components_are_counted_where_factors_meet() -> None:
    three = Adapter.of({"B": to_train((M, R)), "M": to_train((R, 2)), "A": to_train((2, N))}, 1.0)
    assert [rank_axes(three, label) for label in "BMA"] == [(1,), (0, 1), (0,)]
    assert rank_axes(Adapter.of({"D": to_train((M, N))}, 1.0), "D") == ()


def test_a_budget_leaves_the_first_components() -> None:
    masks = trainable(right(), RANKS)
    assert masks["w/B"].tolist() == [
        [[True, False, False]],
        [[True, True, True]],
        [[True, True, False]],
        [[True, True, True]],
    ]
    assert masks["low/B"].squeeze(1).tolist() == [[True, False], *[[True, True]] * 3]
    assert list(masks) == ["w/B", "low/B"]  # a head has no rank


def test_parts_share_the_components() -> None:
    ranks = torch.tensor([[0, 2], [1, 2], [2, 3], [1, 7]])
    assert within(ranks, 5).int().tolist() == [
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [1, 0, 0, 0, 0],
    ]
    every = torch.tensor([[g, 3] for g in range(3)])
    assert within(every, 7).sum(dim=0).tolist() == [1] * 7


def test_two_sketches_with_a_server_step_of_two_merge_the_mean_of_each_group() -> None:
    world = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)})
    method = FedRacLora(rank=2, alpha=5.0, sketches=2, server_lr=2.0)
    state = method.initial_state({"w": torch.zeros(M, N, dtype=torch.float64)}, world, Draw(3))
    sent = method.open_round(state, 1, Cohort(torch.arange(4), torch.ones(4)), Draw(3))
    assert sent.ranks is not None
    group = sent.ranks[:, 0]
    assert sorted(group.tolist()) == [0, 0, 1, 1]
    own = torch.arange(4 * M * 2, dtype=torch.float64).reshape(4, M, 2).sin()
    rows = widen(own.reshape(-1), sent, torch.arange(4))
    got = Uplinks(torch.arange(4), torch.ones(4).double(), sent.layout, rows)
    factor = sent.adapters["w"].factors["A"]
    assert factor.drawing is not None
    A = factor.draw()
    wanted = sum(2.5 * own[group == g].mean(dim=0) @ A[2 * g : 2 * g + 2] for g in (0, 1))
    torch.testing.assert_close(method.close_round(state, sent, got).base["w"], wanted)


def test_more_sketches_than_dimensions_are_refused() -> None:
    world = Plan({"w": LayerView("linear", (M, N))}, shapes={"w": (M, N)})
    with pytest.raises(ConfigError, match=r"8 sketches .*7 dimensions of w.*fewer"):
        FedRacLora(rank=1, sketches=8).initial_state({}, world, Draw(3))


def test_the_middle_of_three_factors_is_cut_on_both_sides() -> None:
    chain = {"B": torch.ones(M, R), "M": to_train((R, R)), "A": torch.ones(R, N)}
    masks = trainable(RoundInstructions({"w": Adapter.of(dict(chain), 1.0)}), torch.tensor([2]))
    wanted = torch.zeros(1, R, R, dtype=torch.bool)
    wanted[:, :2, :2] = True
    assert torch.equal(masks["w/M"], wanted)


@pytest.mark.parametrize("ranks", [None, torch.tensor([3, 3]), torch.tensor([8, 3])])
def test_nothing_is_masked_where_nothing_is_cut(ranks: torch.Tensor | None) -> None:
    assert trainable(right(), ranks) == {}
    mask = uploaded_mask(right(ranks=ranks), torch.arange(2))
    assert mask is None if ranks is None else bool(mask.all())
    assert uploaded_numbers(right(ranks=ranks), 2).tolist() == [M * R + M * 2 + 4 * M] * 2


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_client_sends_its_components_and_all_of_the_head(ranks: list[int]) -> None:
    downlink = right(ranks=torch.tensor(ranks))
    wanted = [M * min(r, R) + M * min(r, 2) + 4 * M for r in ranks]
    assert uploaded_numbers(downlink, len(ranks)).tolist() == wanted
    places = torch.arange(len(ranks)).flip(0)
    mask = uploaded_mask(downlink, places)
    assert mask is not None
    assert mask.shape == (len(ranks), M * R + M * 2 + 4 * M)
    assert mask.sum(dim=1).tolist() == wanted[::-1]
    assert bool(mask[:, -4 * M :].all())


@pytest.mark.parametrize("start", ["zero", "shared", "own"])
def test_rows_are_widened_by_what_was_not_trained(start: str) -> None:
    """Places are those of the cohort: a chunk of some clients gets its own starts."""
    begin = {
        "zero": None,
        "shared": torch.arange(float(M * R)).reshape(M, R),
        "own": torch.arange(float(4 * M * R)).reshape(4, M, R),
    }[start]
    chain = {"B": to_train((M, R), begin), "A": A}
    head = {"head": to_train((2,), torch.tensor([7.0, 7.0]))}
    downlink = RoundInstructions({"w": Adapter.of(dict(chain), 1.0)}, head, ranks=RANKS)
    places = torch.tensor([0, 2])
    mask = uploaded_mask(downlink, places)
    assert mask is not None
    sent = -torch.arange(1.0, 1 + int(mask.sum()))
    rows = widen(sent, downlink, places)
    B, last = rows[:, : M * R].reshape(2, M, R), rows[:, M * R :]
    assert B[0, :, 0].tolist() == [-1, -2, -3, -4, -5]
    assert last[0].tolist() == [-6, -7]
    assert B[1, :, :2].flatten().tolist() == [-8.0 - i for i in range(2 * M)]
    assert last[1].tolist() == [-18, -19]
    whole = torch.zeros(4, M, R) if begin is None else begin.expand(4, M, R)
    assert torch.equal(B[0, :, 1:], whole[0, :, 1:])
    assert torch.equal(B[1, :, 2:], whole[2, :, 2:])
    with pytest.raises(WireError, match=r"2 clients .*\(18,\), expected \(19,\)"):
        widen(sent[1:], downlink, places)


def test_an_exchange_asks_every_client_for_its_own_budget() -> None:
    clients, weights = torch.arange(4), torch.ones(4, dtype=torch.float64)
    check_budgets(right(), Cohort(clients, weights))
    check_budgets(right(ranks=RANKS), Cohort(clients, weights, RANKS))
    with pytest.raises(ConfigError, match="not hand them on"):
        check_budgets(right(), Cohort(clients, weights, RANKS))
    with pytest.raises(ShapeError, match=r"3 clients .*rank budgets of .*\(4,\)"):
        check_budgets(right(ranks=RANKS), Cohort(clients[1:], weights[1:], RANKS[1:]))


def test_what_stays_at_the_client_is_not_counted() -> None:
    chain = {"B": to_train((M, R), upload=False), "A": to_train((R, N))}
    downlink = RoundInstructions({"w": Adapter.of(dict(chain), 1.0)}, ranks=torch.tensor([1, 3]))
    assert uploaded_numbers(downlink, 2).tolist() == [N, 3 * N]
    mask = uploaded_mask(downlink, torch.arange(2))
    assert mask is not None
    assert mask.sum(dim=1).tolist() == [N, 3 * N]
    assert bool(mask[0, :N].all())


def test_a_cut_gradient_is_zero_even_where_it_was_not_a_number() -> None:
    gradients = {"head": torch.ones(2, 4), "w/B": torch.full((2, M, R), torch.nan)}
    found = cut_gradients(gradients, trainable(right(), RANKS))
    assert list(found) == ["head", "w/B"]
    assert found["head"] is gradients["head"]
    assert torch.count_nonzero(found["w/B"][0, :, 1:]) == 0
    assert bool(torch.isnan(found["w/B"][0, :, :1]).all())
    assert bool(torch.isnan(gradients["w/B"]).all())


def test_what_is_held_is_put_back_for_those_that_still_train() -> None:
    masks = trainable(right(), RANKS)
    starts = {"w/B": torch.full((1, M, R), 2.0), "low/B": torch.zeros(1, M, 2)}
    values = {"w/B": torch.full((4, M, R), 3.0), "low/B": torch.ones(4, M, 2)}
    hold(values, starts, masks, active=2)
    assert values["w/B"][:, 0].tolist() == [[3, 2, 2], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert values["low/B"][:, 0].tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]


def test_a_part_of_a_cohort_keeps_its_budgets() -> None:
    cohort = Cohort(torch.tensor([3, 8, 9]), torch.arange(3.0), torch.tensor([1, 2, 4]))
    part = cohort.select(torch.tensor([True, False, True]))
    assert part.ranks is not None
    assert (part.clients.tolist(), part.weights.tolist(), part.ranks.tolist()) == (
        [3, 9],
        [0.0, 2.0],
        [1, 4],
    )


def test_methods_without_a_shared_sketch_refuse_budgets() -> None:
    budgets = SystemConfig(rank_budget=Constant(0.5))
    assert not [*Features([budgets, FedRacLora()]).conflicts()]
    one, _ = Features([budgets, FedAvg()]).conflicts()
    assert one.startswith("system.rank_budget does not go with a method without rank budgets")
