"""Every method under what stands between the checks and it: attacks and robust rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import (
    RAGGED,
    World,
    assert_close_trees,
    assert_equal_trees,
    defaults_short,
    equal_clients,
    every_variant,
    forms_short,
    make_method,
    run,
)

from fedraclora.aggregation.base import Aggregator
from fedraclora.aggregation.robust import (
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormBound,
    TrimmedMean,
)
from fedraclora.attacks import ALittleIsEnough, Attack, AttackedTrainer, SignFlip
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.training.localconfig import LocalConfig

Variant = tuple[str, dict[str, Any]]
RULES = (Median(), TrimmedMean(1), GeometricMedian(), Krum(1), MultiKrum(1), NormBound(1e6))
CPU = torch.device("cpu")


@forms_short
@every_variant
def test_of_clients_that_agree_every_rule_makes_their_update(
    variant: Variant, world: World
) -> None:
    """Five clients of the same samples, in stored order, send one update: so does any rule."""
    same = equal_clients(world, 5)
    local = LocalConfig(lr=0.1, steps=2, batch_size=0, shuffle=False)
    name, changes = variant
    if name == "fedkseed":
        pytest.skip("each client draws directions of its own, so equal clients send other numbers")
    method, draw = make_method(name, **changes), Draw(1)
    plain = run(same, method, local, rounds=2, chunk=5)
    state = method.initial_state(same.base, same.plan, draw)
    sent = method.open_round(state, 1, Cohort(torch.arange(5), torch.ones(5)), draw)
    for rule in RULES:
        if (rule.estimates and not method.traits.linear) or (rule.compares and sent.apart):
            with pytest.raises(ConfigError, match=f"a robust rule that .*aggregator={rule.name}"):
                run(same, method, local, rounds=2, aggregator=rule)
            continue
        found = run(same, method, local, rounds=2, chunk=5, aggregator=rule)
        assert_close_trees(found.weights, plain.weights, 1e-9)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_chunks_do_not_change_what_a_rule_makes(rule: Aggregator, world: World) -> None:
    runs = [
        run(world, make_method("fed_rac_lora"), RAGGED, rounds=3, chunk=chunk, aggregator=rule)
        for chunk in (1, 1, 5)
    ]
    assert_equal_trees(runs[0].weights, runs[1].weights)
    assert_close_trees(runs[0].weights, runs[2].weights, 1e-9)


@defaults_short
@every_variant
def test_attackers_and_no_others_send_something_else(variant: Variant, world: World) -> None:
    name, changes = variant
    method, draw = make_method(name, **changes), Draw(1)
    clients = torch.arange(5)
    state = method.initial_state(world.base, world.plan, draw)
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(5)), draw)
    results = []
    for attack in (Attack(), SignFlip(0.4, 3.0)):
        trainer = AttackedTrainer(
            world.task, world.plan, RAGGED, seed=1, device=CPU, precision="float32", attack=attack
        )
        results.append(trainer.train(world.base, sent, clients, round_=1, rate_scale=1.0))
    bad = torch.isin(clients, SignFlip(0.4).attackers(1, 5))
    assert int(bad.sum()) == 2
    for key, slot in sent.uploaded().items():
        honest, found = results[0].trained[key], results[1].trained[key]
        assert torch.equal(found[~bad], honest[~bad]), key
        start = slot.opening()
        if start is None:
            start = world.base.get(key, torch.zeros(slot.shape))
        start = start[bad] if slot.per_client else start
        wanted = start - 3 * (honest[bad] - start)
        torch.testing.assert_close(found[bad], wanted.double(), rtol=1e-9, atol=1e-12)
    assert torch.equal(results[0].losses, results[1].losses)


def test_colluders_act_on_what_came_and_the_ledger_counts_them(world: World) -> None:
    method = make_method("fed_rac_lora")
    plain = run(world, method, RAGGED, rounds=2)
    attack = ALittleIsEnough(0.4, z=2.0)
    found = run(world, method, RAGGED, rounds=2, attack=attack)
    assert [row["attackers"] for row in found.rows] == [2, 2]
    assert not any("attackers" in row for row in plain.rows)
    gap = found.weights["fc1.weight"] - plain.weights["fc1.weight"]
    assert float(gap.abs().max()) > 1e-4
