"""XGBLoRA: which layers a booster has, what shrinkage does, and what many subsets hold."""

from __future__ import annotations

import pytest
import torch
from worlds import (
    FULL_BATCH,
    RAGGED,
    assert_close_trees,
    make_method,
    make_world,
    mean_weights,
    play_rounds,
    run,
)

from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Draw
from fedraclora.strategies.methods.xgblora import XgbLora
from fedraclora.training.cohort import PROGRAMS_KEPT

DRAW = Draw(17)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.34, 2), (0.5, 2), (1.0, 3)])
def test_a_booster_has_a_share_of_the_layers_rounded_up(share: float, count: int) -> None:
    world = make_world()
    method = XgbLora(alpha=5.0, layers=share)
    subsets = set()
    for played in play_rounds(method, world, 12, DRAW):
        trained = tuple(played.sent.adapters)
        subsets.add(trained)
        assert len(trained) == count
        assert list(trained) == [n for n in world.plan.targets if n in trained]
        for name in set(world.plan.targets) - set(trained):
            assert torch.equal(played.after.base[name], played.before.base[name])
    assert {n for s in subsets for n in s} == set(world.plan.targets)
    assert (len(subsets) > 1) == (count < 3)


def test_the_seed_of_the_subsets_is_not_that_of_the_run() -> None:
    world = make_world()
    names = [
        [list(p.sent.adapters) for p in play_rounds(XgbLora(layers_seed=s), world, 8, draw)]
        for s, draw in ((0, DRAW), (0, Draw(5)), (1, DRAW))
    ]
    assert names[0] == names[1] != names[2]


def test_all_layers_without_shrinkage_are_fed_cola() -> None:
    world = make_world()
    boosted = make_method("xgblora", layers=1.0, server_lr=1.0)
    done = [run(world, m, RAGGED, rounds=3) for m in (boosted, make_method("fed_cola"))]
    assert_close_trees(done[0].weights, done[1].weights)


def test_shrinkage_is_a_shorter_step_to_the_mean() -> None:
    world = make_world()
    for eta in (1.0, 0.25):
        (row,) = play_rounds(XgbLora(rank=2, alpha=5.0, server_lr=eta), world, 1, DRAW)
        mean = mean_weights(row)
        for name in row.sent.adapters:
            B, A = (row.uplinks.mean()[f"{name}/{k}"] for k in ("B", "A"))
            moved = row.after.base[name] - world.base[name]
            torch.testing.assert_close(moved, eta * 2.5 * B @ A, rtol=1e-10, atol=1e-12)
        for name in world.plan.dense:
            moved = row.after.base[name] - world.base[name]
            torch.testing.assert_close(moved, eta * (mean[name] - world.base[name]))


def test_boosters_lower_the_loss_and_old_models_are_let_go() -> None:
    world = make_world()
    method = XgbLora(alpha=5.0, layers=0.34, server_lr=0.7)
    done = run(world, method, FULL_BATCH, rounds=20)
    losses = [row["metrics"]["loss"] for row in done.rows]
    assert losses[-1] < losses[9] < losses[0]
    assert len(done.worker.trainer._programs) <= PROGRAMS_KEPT


@pytest.mark.parametrize("key", ["layers", "server_lr"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_impossible_numbers_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{key}"):
        XgbLora(**{key: value})


def test_more_than_all_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.layers=1\.5"):
        XgbLora(layers=1.5)
