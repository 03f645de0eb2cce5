"""AdaLoRA's schedule around methods: what is cut, that the weights stay, bytes, resuming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from worlds import (
    FULL_BATCH,
    Played,
    assert_close_trees,
    assert_equal_trees,
    conv1d,
    linear,
    make_method,
    make_world,
    play_rounds,
    run,
    some_cohort,
)

from fedraclora.allocation import AdaLora
from fedraclora.compatibility import Features
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Draw, State
from fedraclora.strategies.wrappers.allocated import allocated
from fedraclora.strategies.wrappers.pruned import Pruned
from fedraclora.tree import Tree
from tests.reference.chain import replay

LAYERS = {"linear": linear, "conv1d": conv1d}
DRAW = Draw(17)
RULE = AdaLora(target=1.0, begin=1, end=5)


def pruned(name: str = "fedavg_lora", rule: AdaLora = RULE, **changes: Any) -> Pruned:
    made = allocated(make_method(name, **changes), rule)
    assert isinstance(made, Pruned)
    return made


def ranks(state: State) -> list[int]:
    return [Pruned.kept(state).rank[name] for name in state.plan.targets]


def unpruned(played: Played) -> Tree:
    """What FedAvg-LoRA makes of a round, written out: W + s B_bar A_bar."""
    mean, out = played.uplinks.mean(), dict(played.before.base)
    for name, view in played.before.plan.targets.items():
        if (adapter := played.sent.adapters.get(name)) is not None:
            product = adapter.scale * mean[f"{name}/B"] @ mean[f"{name}/A"]
            out[name] = out[name] + (product.T if view.kind == "conv1d" else product)
    return out | {name: mean[name] for name in played.before.plan.dense}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_cut_leaves_the_effective_weights(layer: str) -> None:
    method, world = pruned(), make_world(LAYERS[layer])
    rounds = play_rounds(method, world, 7, DRAW)
    for played in rounds:
        assert_close_trees(method.weights(played.after, DRAW), unpruned(played))
    assert sum(ranks(rounds[0].after)) == 9
    assert sum(ranks(rounds[-1].after)) == 3


def test_the_budget_is_kept_and_the_scale_follows_the_rank() -> None:
    method, world = pruned(), make_world()
    for t, played in enumerate(play_rounds(method, world, 7, DRAW), start=1):
        left = RULE.budget(t, first=9, layers=3)
        assert sum(ranks(played.after)) == (9 if left is None else left)
        for name, adapter in played.sent.adapters.items():
            rank = Pruned.kept(played.before).rank[name]
            assert adapter.scale == pytest.approx(5.0 / rank, rel=1e-15)
            assert adapter.factors["B"].shape[1] == rank
        trained = [n for n in world.plan.targets if Pruned.kept(played.before).rank[n]]
        assert list(played.sent.adapters) == trained
        assert method.weights(played.after, DRAW).keys() == world.base.keys()


@pytest.mark.parametrize("name", ["fedavg_lora", "fedex_lora"])
@pytest.mark.parametrize("initial", ["kaiming_uniform", "pissa"])
def test_links_rebuild_the_base_to_the_bit(name: str, initial: str) -> None:
    method, world = pruned(name, init=initial), make_world(conv1d)
    first = method.initial_state(world.base, world.plan, DRAW).base
    links = []
    for played in play_rounds(method, world, 7, DRAW):
        assert played.after.link is not None
        links.append(played.after.link)
        assert_equal_trees(replay(first, links, world.plan), played.after.base)
    assert any(link.terms for link in links)


def test_fedex_stays_exact_under_a_schedule() -> None:
    """The mean of the clients' weights, whatever is cut afterwards."""
    method, world = pruned("fedex_lora"), make_world()
    for played in play_rounds(method, world, 6, DRAW):
        inner, at = method.in_effect(played.before)
        plain = inner.close_round(at, played.sent, played.uplinks)
        assert_close_trees(method.weights(played.after, DRAW), inner.weights(plain, DRAW))


def test_components_that_do_not_matter_are_cut() -> None:
    """Only one row of A moves in each layer, the last one: that component is kept."""
    method, world = pruned(rule=replace(RULE, begin=0, end=1)), make_world()
    state = method.initial_state(world.base, world.plan, DRAW)
    cohort = some_cohort()
    (played,) = play_rounds(method, world, 1, DRAW, cohort)
    starts = {n: s.opening() for n, s in played.sent.uploaded().items()}
    rows = {}
    for name, shape in played.uplinks.layout.shapes:
        start = starts[name]
        rows[name] = (torch.zeros(shape) if start is None else start).double().clone()
        if name.endswith("/A"):
            rows[name][2] *= 2
    row = played.uplinks.layout.pack(rows)
    got = replace(played.uplinks, stacked=row.expand(len(cohort), -1))
    after = method.close_round(state, played.sent, got)
    assert ranks(after) == [1, 1, 1]
    for name in world.plan.targets:
        torch.testing.assert_close(after.carried[f"{name}/A"], rows[f"{name}/A"][2:])


def test_bytes_fall_with_the_ranks_and_training_goes_on() -> None:
    world = make_world()
    done = run(world, pruned(), FULL_BATCH, rounds=8)
    sides = {n: sum(v.shape) for n, v in world.plan.targets.items()}
    dense = sum(world.base[n].numel() for n in world.plan.dense)
    last = done.strategy.state
    numbers = sum(Pruned.kept(last).rank[n] * sides[n] for n in sides) + dense
    ups = [row["uplink_bytes"] for row in done.rows]
    assert ups[0] == ups[1] == 5 * 8 * (3 * sum(sides.values()) + dense)
    assert ups[-1] == 5 * 8 * numbers
    assert ups == sorted(ups, reverse=True)
    method, state = done.strategy.method.in_effect(last)
    assert method.floats(state.plan, 9) == (numbers, numbers - dense)
    losses = [row["metrics"]["loss"] for row in done.rows]
    assert losses == sorted(losses, reverse=True)


def test_methods_whose_components_do_not_live_on_are_refused() -> None:
    for name in ("fed_cola", "flexlora", "fed_rac_lora", "fedavg"):
        (said,) = Features([make_method(name), RULE]).conflicts()
        assert "restarts its components" in said


@pytest.mark.parametrize(("target", "left"), [(4.0, 12), (0.1, 0)])
def test_a_target_that_cannot_be_met_is_refused(target: float, left: int) -> None:
    world = make_world()
    with pytest.raises(ConfigError, match=f"leaves {left} of the 9 components"):
        pruned(rule=replace(RULE, target=target)).initial_state(world.base, world.plan, DRAW)
