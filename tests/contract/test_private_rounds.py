"""Client-level privacy in whole runs of every method: sensitivity, account, no leak."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import (
    BY_LOSSES,
    RAGGED,
    World,
    assert_close_trees,
    defaults_short,
    every_variant,
    forms_short,
    label,
    make_method,
    make_world,
    random_replies,
    run,
    variants,
)

from fedraclora.aggregation.base import AggregationContext
from fedraclora.aggregation.robust import Median
from fedraclora.attacks import SignFlip
from fedraclora.errors import ConfigError
from fedraclora.privacy.accountant import epsilon
from fedraclora.privacy.client_level import ClientLevel, Mechanism
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.privacy.secagg import SecAgg
from fedraclora.privacy.secret import KEY_FILE, Secret
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import number
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.steps.local import SampleAccount
from fedraclora.strategies.steps.private import PrivateRounds
from fedraclora.strategies.steps.robust import Attackers
from fedraclora.strategies.steps.secure import SecureSum

Variant = tuple[str, dict[str, Any]]
LINEAR = [v for v in variants() if make_method(v[0], **v[1]).traits.linear]


def leaves_some_alone(variant: Variant) -> bool:
    """Whether noise would move numbers that clients never train: refused (test_what_fits)."""
    world, method = make_world(), make_method(variant[0], **variant[1])
    state, draw = method.initial_state(world.base, world.plan, Draw(0)), Draw(0)
    one = Cohort(torch.arange(1), torch.ones(1).double())
    return method.open_round(state, 1, one, draw).program.fixes


every_linear = pytest.mark.parametrize(
    "variant", [v for v in LINEAR if not leaves_some_alone(v)], ids=label
)
KEY = bytes(range(32))
LOOP = LoopConfig(3, 5, 5, 2, 0, "uniform")
SILENT = Mechanism(1.0, 5, 1.0, 0.0, 1e-5)  # no noise on the sum: what is before it shows


def private(**changes: Any) -> dict[str, Any]:
    """A treatment with a key of the test's own."""
    settings: dict[str, Any] = {"clip": 0.05, "noise_multiplier": 0.5, "delta": 1e-3} | changes
    return {"privacy": ClientLevel(**settings), "secret": Secret(KEY)}


def silent(clip: float) -> PrivateRounds:
    """Rounds without noise."""
    rounds = PrivateRounds(ClientLevel(clip=clip), Secret(KEY))
    rounds.mechanism = SILENT
    return rounds


@given(seed=st.integers(0, 10**6), gone=st.integers(0, 4), clip=st.floats(0.01, 100.0))
def test_one_client_moves_the_sum_by_no_more_than_the_clip(
    seed: int, gone: int, clip: float
) -> None:
    """Sent far too long, on purpose: what the client should have done is done by the server."""
    world = make_world()
    method, draw = make_method("fed_rac_lora", merge_every=3), Draw(seed)
    cohort = Cohort(torch.arange(5), torch.ones(5).double())
    state = method.initial_state(world.base, world.plan, draw)
    sent = method.open_round(state, 1, cohort, draw)
    setting = AggregationContext(sent, 1, draw, world.base)
    got = random_replies(sent, cohort, torch.float64, seed)
    assert got.stacked is not None
    keep = torch.arange(5) != gone
    fewer = Uplinks(got.clients[keep], got.weights[keep], got.layout, got.stacked[keep])
    sums = []
    for uplinks in (got, fewer):
        mean = got.layout.pack(silent(clip).treat(uplinks, setting).mean())
        sums.append(mean * SILENT.cohort)
    moved = float((sums[0] - sums[1]).norm())
    assert moved <= clip * (1 + 1e-9)
    assert moved > 0.9 * clip or clip > 1


@forms_short
@every_linear
def test_without_noise_and_with_a_wide_clip_it_is_the_plain_mean(
    variant: Variant, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = variant
    plain = run(world, make_method(name, **changes), RAGGED, rounds=3, weights="uniform")
    monkeypatch.setattr(Mechanism, "noisy_sum", lambda self, total, *rest: total)
    found = run(
        world,
        make_method(name, **changes),
        RAGGED,
        rounds=3,
        weights="uniform",
        treatment=private(clip=1e6),
    )
    assert_close_trees(found.weights, plain.weights, 1e-9)


@defaults_short
@every_linear
def test_the_ledger_has_the_account_and_no_losses(variant: Variant, world: World) -> None:
    name, changes = variant
    found = run(
        world,
        make_method(name, **changes),
        RAGGED,
        rounds=4,
        cohort=2,
        weights="uniform",
        treatment=private(),
    )
    for round_, row in enumerate(found.rows, start=1):
        wanted = epsilon(0.5, 2 / 5, round_, 1e-3)
        assert number(row, "privacy", "epsilon") == pytest.approx(wanted, rel=1e-12)
        assert row["train_loss"] is None
    for asked, answered in zip(found.worker.asked, found.worker.answered, strict=True):
        assert json.loads(str(asked["config"]["header"]))["request"]["clip"] == 0.05
        assert KEY.hex() not in str(asked)
        assert "flat" in answered["arrays"]


@pytest.mark.slow
def test_rounds_that_nobody_takes_part_in_are_noise(world: World) -> None:
    found = run(
        world,
        make_method("fed_rac_lora"),
        RAGGED,
        rounds=12,
        cohort=1,
        weights="uniform",
        treatment=private(),
    )
    sizes = [row["cohort"] for row in found.rows]
    assert 0 in sizes
    assert max(sizes) > 1
    assert len(found.rows) == 12
    assert all(row["metrics"]["loss"] is not None for row in found.rows)


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_key_of_a_run_is_in_its_own_file_alone(
    world: World, tmp_path: Path, quantile: float | None
) -> None:
    count = None if quantile is None else 1.5
    config = ClientLevel(
        clip=0.05, noise_multiplier=2.0, delta=1e-3, quantile=quantile, count_noise=count
    )
    more: dict[str, Any] = {"cohort": 2, "weights": "uniform", "folder": tmp_path}
    method = make_method("fed_rac_lora", merge_every=2)
    found = run(world, method, RAGGED, rounds=3, treatment={"privacy": config}, **more)
    key = (tmp_path / KEY_FILE).read_bytes()
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name != KEY_FILE.name:
            assert key not in path.read_bytes(), path
    clips = {number(r, "privacy", "next_clip") for r in found.rows}
    assert (len(clips) > 1) == (quantile is not None)


def test_an_attacker_is_shortened_by_the_server(world: World) -> None:
    method, draw = make_method("fed_rac_lora"), Draw(1)
    cohort = Cohort(torch.arange(5), torch.ones(5).double())
    sent = method.open_round(method.initial_state(world.base, world.plan, draw), 1, cohort, draw)
    got = random_replies(sent, cohort, torch.float64, 1)
    assert got.stacked is not None
    got.stacked[3] *= 1e9
    setting = AggregationContext(sent, 1, draw, world.base)
    found = got.layout.pack(silent(2.0).treat(got, setting).mean())
    assert float(found.abs().max()) < 5 * 2.0 + float(
        max(t.abs().max() for t in world.base.values())
    )


def test_what_does_not_go_with_privacy_is_refused(world: World) -> None:
    method = make_method("fed_rac_lora")
    with pytest.raises(ConfigError, match="aggregation_weights=uniform"):
        run(world, method, RAGGED, rounds=1, treatment=private())
    treatment = private() | {"aggregator": Median()}
    with pytest.raises(ConfigError, match="aggregator=median"):
        run(world, method, RAGGED, rounds=1, weights="uniform", treatment=treatment)
    for step in (silent(1.0), SecureSum(SecAgg()), SampleAccount(SampleNoise())):
        with pytest.raises(ConfigError, match=r"two exchanges in a round.*ake"):
            step.bound(first=False)
    assert silent(1.0).bound(first=True) == 1.0
    assert Attackers(SignFlip(0.2)).bound(first=False) is None


@forms_short
@every_variant
def test_samples_have_an_account_and_losses_stay_at_home(variant: Variant, world: World) -> None:
    name, changes = variant
    local = replace(RAGGED, epochs=2, dp=SampleNoise(0.5, 1.0))
    if name in BY_LOSSES:
        with pytest.raises(ConfigError, match=r"local\.dp .*estimates gradients from losses"):
            run(world, make_method(name, **changes), local, rounds=1)
        return
    found = run(world, make_method(name, **changes), local, rounds=3, cohort=2)
    taken = torch.zeros(5, dtype=torch.int64)
    for round_, row in enumerate(found.rows, start=1):
        taken[draw_cohort(1, round_, 5, 2)] += local.epochs
        wanted = SampleNoise(0.5, 1.0).epsilon(int(taken.max()))
        assert number(row, "sample_privacy", "epsilon") == wanted
        assert row["train_loss"] is None
    for reply in found.worker.answered:
        assert not any(bytes(reply["chunk"]["losses"]))


@every_variant
def test_a_method_that_needs_each_update_gets_no_private_round(
    variant: Variant, world: World
) -> None:
    method = make_method(variant[0], **variant[1])
    if method.traits.linear:
        return
    with pytest.raises(ConfigError, match="each client's update"):
        run(world, method, RAGGED, rounds=1, weights="uniform", treatment=private())
