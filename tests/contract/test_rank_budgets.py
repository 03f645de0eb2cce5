"""What a method promises that claims `Traits.ranks`; the others refuse clients with budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_round_failures import faulty, without_client
from typing_extensions import override
from worlds import (
    FULL_BATCH,
    RAGGED,
    RANK,
    UNEQUAL,
    Played,
    Run,
    World,
    array_bytes,
    assert_close_trees,
    assert_equal_trees,
    conv1d,
    distance,
    forms_short,
    label,
    linear,
    make_method,
    make_world,
    play_rounds,
    run,
    some_cohort,
    stepped,
    variants,
    with_pools,
)

from fedraclora.compatibility import Features
from fedraclora.devices.distributions import Constant
from fedraclora.devices.system import SystemConfig
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.method import Cohort, Draw, Method, Plan, RoundInstructions, State, Traits
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import digest_rows
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.tree import Tree
from tests.messages import unpack_downlink

Variant = tuple[str, dict[str, Any]]
ABLE = [v for v in variants() if make_method(v[0], **v[1]).traits.ranks]
UNABLE = [v for v in variants() if not make_method(v[0], **v[1]).traits.ranks]
LAYERS = {"linear": linear, "conv1d": conv1d}
DRAW = Draw(seed=17)
BUDGETED = SystemConfig(rank_budget=Constant(0.5))
RANKS = (1, RANK, 2, 9)  # of the cohort of `some_cohort`
BUDGETS = torch.tensor([2, 1, 9, 3, 1])  # of the five clients of a run
ITEM, COHORT, ROUNDS = 8, 3, 5

able = pytest.mark.parametrize("variant", ABLE, ids=label)


@pytest.fixture(scope="module", params=list(LAYERS))
def world(request: pytest.FixtureRequest) -> World:
    return make_world(LAYERS[request.param])


def with_ranks(ranks: tuple[int, ...] = RANKS, weights: tuple[float, ...] = UNEQUAL) -> Cohort:
    return replace(some_cohort(weights), ranks=torch.tensor(ranks))


def start_of(factor: Factor) -> torch.Tensor:
    """Where each client of the cohort starts, [K, ...]."""
    opening = factor.opening()
    start = torch.zeros(factor.shape, dtype=torch.float64) if opening is None else opening
    return start if factor.per_client else start.expand(len(RANKS), *factor.shape)


def cut_weights(played: Played, k: int, rank: int) -> Tree:
    """Dense weights of the client at place ``k``: W + s B[:, :r] A[:r], and what it was sent."""
    base, plan = with_pools(played), played.before.plan
    rows, out = played.uplinks.stack(), dict(base)
    for weight, adapter in played.sent.adapters.items():
        pair, start = [], []
        for name, factor in adapter.factors.items():
            if not factor.trained:
                pair.append(factor.draw())
                start.append(factor.draw())
                continue
            pair.append(rows[f"{weight}/{name}"][k])
            start.append(start_of(factor)[k])
        change = pair[0][:, :rank] @ pair[1][:rank]
        change = change + start[0][:, rank:].double() @ start[1][rank:].double()
        transposed = plan.targets[weight].kind == "conv1d"
        out[weight] = base[weight] + adapter.scale * (change.T if transposed else change)
    return out | {name: rows[name][k] for name in played.sent.dense}


# --- weights -------------------------------------------------------------------------------------


@able
def test_the_new_weights_are_the_dense_sum_over_clients_of_any_rank(
    variant: Variant, world: World
) -> None:
    """sum_k p_k (W + s B_k[:, :r_k] A[:r_k]): unequal p_k, alpha != rank, m != n."""
    method = make_method(variant[0], **variant[1])
    shares = [w / sum(UNEQUAL) for w in UNEQUAL]
    targets = list(world.plan.targets)
    for played in play_rounds(method, world, 4, DRAW, with_ranks()):
        each = [cut_weights(played, k, rank) for k, rank in enumerate(RANKS)]
        wanted = {
            name: torch.stack([p * w[name] for p, w in zip(shares, each, strict=True)]).sum(dim=0)
            for name in world.base
        }
        wanted, found = stepped(method, played, wanted, DRAW), method.weights(played.after, DRAW)
        if method.traits.exact:
            assert_close_trees(found, wanted)
            continue
        missed = distance(found, wanted, targets)
        change = distance(wanted, method.weights(played.before, DRAW), targets)
        assert played.after.report["aggregation_error"] == pytest.approx(missed / change, rel=1e-9)


@able
def test_a_component_moves_by_the_clients_that_train_it(variant: Variant, world: World) -> None:
    method = make_method(variant[0], **variant[1])
    for played in play_rounds(method, world, 3, DRAW, with_ranks((1, 2, 1, 2))):
        mean = played.uplinks.mean()
        for weight, adapter in played.sent.adapters.items():
            for name, factor in adapter.factors.items():
                if not factor.trained:
                    continue
                shares = played.uplinks.weights / played.uplinks.total
                start = (shares[:, None, None] * start_of(factor)).sum(dim=0)
                moved = (mean[f"{weight}/{name}"] - start).abs()
                moved = moved.amax(dim=0 if name == "B" else 1)
                assert bool((moved[:2] > 1e-3).all())
                # A mean of equal numbers rounds.
                assert float(moved[2]) <= 1e-15


# --- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budgeted(Method):
    """A method whose cohorts have budgets by client id."""

    inner: Method
    ranks: tuple[int, ...]

    @property
    @override
    def traits(self) -> Traits:
        return self.inner.traits

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        return self.inner.initial_state(base, plan, draw)

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        cohort = replace(cohort, ranks=torch.tensor(self.ranks)[cohort.clients])
        return self.inner.open_round(state, round_, cohort, draw)

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        return self.inner.close_round(state, sent, uplinks)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        return self.inner.weights(state, draw, own)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        return self.inner.floats(plan, round_)


def finished(variant: Variant, ranks: torch.Tensor | None, chunk: int) -> Run:
    method = make_method(variant[0], **variant[1])
    if ranks is not None:
        method = Budgeted(method, tuple(ranks.tolist()))
    return run(make_world(), method, RAGGED, rounds=ROUNDS, cohort=COHORT, chunk=chunk)


RUNS: dict[tuple[str, tuple[int, ...] | None, int], Run] = {}


def known(variant: Variant, ranks: torch.Tensor | None, chunk: int) -> Run:
    """The same, made once for the tests that do no more than read it."""
    key = label(variant), None if ranks is None else tuple(ranks.tolist()), chunk
    if key not in RUNS:
        RUNS[key] = finished(variant, ranks, chunk)
    return RUNS[key]


@forms_short
@able
def test_budgets_that_cut_nothing_change_no_bit(variant: Variant) -> None:
    for chunk in (1, COHORT):
        plain = known(variant, None, chunk)
        whole = known(variant, torch.arange(RANK, RANK + 5), chunk)
        assert_equal_trees(whole.weights, plain.weights)
        assert digest_rows(whole.rows) == digest_rows(plain.rows)


@able
def test_the_uplink_of_the_ledger_is_the_components_and_the_message(variant: Variant) -> None:
    done = known(variant, BUDGETS, chunk=1)
    plan = make_world().plan
    dense = sum(torch.Size(plan.shapes[name]).numel() for name in plan.dense)
    asked, answered = iter(done.worker.asked), iter(done.worker.answered)
    for round_, row in enumerate(done.rows, start=1):
        wanted = 0
        for rank in BUDGETS[draw_cohort(1, round_, 5, COHORT)].tolist():
            opened, _ = unpack_downlink(next(asked))
            trained = [
                factor.shape[0 if name == "B" else 1] * min(rank, RANK)  # r_k m, or r_k n
                for adapter in opened.adapters.values()
                for name, factor in adapter.factors.items()
                if factor.trained
            ]
            wanted += (sum(trained) + dense) * ITEM
        assert row["uplink_bytes"] == wanted
        assert row["uplink_bytes"] == sum(array_bytes(next(answered)) for _ in range(COHORT))


@forms_short
@able
def test_bytes_do_not_depend_on_the_chunk(variant: Variant) -> None:
    columns = ("uplink_bytes", "downlink_bytes", "catchup_bytes", "downlink_total")
    runs = [known(variant, BUDGETS, chunk) for chunk in (1, 2, COHORT)]
    whole = known(variant, None, 1)
    for one, two, three, plain in zip(*(r.rows for r in [*runs, whole]), strict=True):
        assert [one[c] for c in columns] == [two[c] for c in columns] == [three[c] for c in columns]
        assert one["uplink_bytes"] < plain["uplink_bytes"]
        assert one["downlink_bytes"] == plain["downlink_bytes"]
        assert one["catchup_bytes"] <= plain["catchup_bytes"]  # a stack holds no empty components


@forms_short
@able
def test_sums_of_blocks_are_those_of_rows(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that is summed where it trains comes to the bits of its clients' cut rows."""
    if not make_method(variant[0], **variant[1]).traits.linear:
        pytest.skip("needs each client's own update")
    summed = finished(variant, BUDGETS, COHORT)
    monkeypatch.setattr(LoopConfig, "whole_blocks", lambda *_: False)
    apart = finished(variant, BUDGETS, COHORT)
    assert array_bytes(summed.worker.answered[0]) != array_bytes(apart.worker.answered[0])
    assert_equal_trees(summed.weights, apart.weights)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_client_that_fails_takes_its_budget_along(chunk: int) -> None:
    """The others' numbers stand in their own places, in whatever chunk the failure fell."""
    method, (one, two, _, *rest) = make_method("ffa_lora"), BUDGETS.tolist()
    some, world = Budgeted(method, (one, two, *rest)), without_client(make_world(), 2)
    settings: dict[str, Any] = {"rounds": 3, "weights": "uniform", "chunk": chunk}
    every = Budgeted(method, tuple(BUDGETS.tolist()))
    done = run(faulty(raising=(2,)), every, FULL_BATCH, max_failures=1, **settings)
    alone = run(world, some, FULL_BATCH, **settings)  # ids move on: nothing is shuffled by them
    assert_close_trees(done.weights, alone.weights, tolerance=1e-11)
    for left, right in zip(done.rows, alone.rows, strict=True):
        assert [f["client"] for f in left["failures"]] == [2]
        assert left["uplink_bytes"] == right["uplink_bytes"]


@able
def test_budgets_matter(variant: Variant) -> None:
    small, whole = known(variant, BUDGETS, 1), known(variant, None, 1)
    for name in make_world().plan.targets:
        assert not torch.allclose(small.weights[name], whole.weights[name], atol=1e-4)


# --- who refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", UNABLE, ids=label)
def test_methods_that_do_not_claim_budgets_refuse_them(variant: Variant) -> None:
    method = make_method(variant[0], **variant[1])
    assert [*Features([BUDGETED, method]).conflicts()]
    world = make_world()
    sent = method.open_round(
        method.initial_state(world.base, world.plan, DRAW), 1, with_ranks(), DRAW
    )
    handed = sent.ranks is not None and sent.ranks.tolist() == list(RANKS)
    assert not handed, "the method hands budgets on: say ranks=True"


@able
def test_methods_that_claim_budgets_hand_them_on(variant: Variant, world: World) -> None:
    method = make_method(variant[0], **variant[1])
    assert not [*Features([BUDGETED, method]).conflicts()]
    state = method.initial_state(world.base, world.plan, DRAW)
    sent = method.open_round(state, 1, with_ranks(), DRAW)
    assert sent.ranks is not None
    assert sent.ranks.tolist() == list(RANKS)
    assert method.open_round(state, 1, some_cohort(), DRAW).ranks is None
