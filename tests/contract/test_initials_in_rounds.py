"""Starts in whole rounds: what LoRA-GA finds through messages, what travels, and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import (
    FULL_BATCH,
    RAGGED,
    World,
    assert_close_trees,
    assert_equal_trees,
    assert_updates_lead_on,
    conv1d,
    linear,
    make_method,
    make_world,
    run,
)

from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.allocation import HeteroLora, Uniform
from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import SEED_BYTES
from fedraclora.protocol.link import Plan
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.strategies.shared.initials import GAMMA, STARTS
from fedraclora.strategies.wrappers.allocated import allocated
from tests.common import accepted
from tests.messages import unpack_downlink

RANK, ITEM = 2, 8
LAYERS = {"linear": linear, "conv1d": conv1d}
METHODS = ("fedavg_lora", "fedex_lora", "hetlora")


def gradients(world: World) -> dict[str, torch.Tensor]:
    """Of the mean loss over all samples, by autograd, as (out, in)."""
    values = {n: t.clone().requires_grad_() for n, t in world.base.items()}
    samples = world.task.test
    output = torch.func.functional_call(world.task.model, values, (samples.inputs["x"],))
    loss = torch.nn.functional.cross_entropy(output, samples.target)
    found = torch.autograd.grad(loss, [values[n] for n in world.plan.targets])
    views = world.plan.targets.items()
    return {n: v.matrix(g) for (n, v), g in zip(views, found, strict=True)}


@pytest.mark.parametrize("layer", LAYERS)
def test_lora_ga_finds_the_singular_vectors_of_the_mean_gradient(layer: str) -> None:
    """Clients of unequal size, whose mean gradient is that of the whole table."""
    world = make_world(LAYERS[layer])
    method = make_method("fedavg_lora", rank=RANK, init="lora_ga")
    done = run(world, method, FULL_BATCH, rounds=1)
    carried = done.strategy.state.carried
    for name, G in gradients(world).items():
        U, _, Vt = torch.linalg.svd(G)
        c = G.shape[0] ** 0.25 / GAMMA**0.5
        rows = {"A": Vt[:RANK], "B": U[:, RANK : 2 * RANK].mT}
        found = {"A": carried[f"{name}/A"] / c, "B": carried[f"{name}/B"].mT / c}
        for label, wanted in rows.items():
            overlap = (found[label] @ wanted.mT).abs()
            torch.testing.assert_close(overlap, torch.eye(RANK).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("initial", STARTS)
def test_what_a_start_costs_is_the_formula(name: str, initial: str) -> None:
    world = make_world()
    method = make_method(name, rank=RANK, init=initial)
    done = run(world, method, RAGGED, rounds=3, cohort=3, chunk=1)
    for round_, row in enumerate(done.rows, start=1):
        up, down = method.floats(world.plan, round_)
        assert row["uplink_bytes"] == 3 * ITEM * up
        probes = initial == "lora_ga" and round_ == 1
        seeds = SEED_BYTES * len(world.plan.targets) if probes else 0
        assert row["downlink_bytes"] == 3 * (ITEM * down + seeds)
    first = [method.floats(world.plan, 1)[1], method.floats(world.plan, 2)[1]]
    assert first == wanted_numbers(world.plan, initial)


def wanted_numbers(plan: Plan, initial: str) -> list[int]:
    """Numbers down in rounds 1 and 2, written out for this world: 6 x 7, 6 x 6, 5 x 6."""
    factors = RANK * (13 + 12 + 11)
    assert [v.shape for v in plan.targets.values()] == [(6, 7), (6, 6), (5, 6)]
    probe = 6 * 6 + 6 * 6 + 5 * 5  # q m, with q = min(4 r, m, n)
    return [probe if initial == "lora_ga" else factors, factors]


@pytest.mark.parametrize("name", METHODS)
def test_a_probe_moves_nothing_and_then_training_goes_on(name: str) -> None:
    world = make_world()
    method = make_method(name, rank=RANK, init="lora_ga")
    probed = run(world, method, RAGGED, rounds=1)
    assert_close_trees(probed.weights, world.base)
    done = run(world, method, RAGGED, rounds=4)
    losses = [row["metrics"]["loss"] for row in done.rows]
    assert losses[0] == pytest.approx(world.loss(world.base), rel=1e-12)
    assert losses[3] < losses[2] < losses[1] < losses[0]


# --- the first frozen factor from the gradient ---------------------------------------------------

FIRST = [
    ("fed_rac_lora", {"merge_every": 2}),
    ("fed_rac_lora", {"train": "A", "sketches": 2, "normalize": "identity"}),
    ("ffa_lora", {"rank": 7}),  # more than the rows of two layers
    ("subspace_rac_lora", {"fresh": 0.5}),
    ("subspace_rac_lora", {"basis": "coordinate", "merge_every": 1}),
]
firsts = pytest.mark.parametrize(("name", "more"), FIRST, ids=str)


def first(name: str, more: dict[str, Any]) -> Any:
    return make_method(name, **({"rank": RANK, "init": "gradient"} | more))


@pytest.mark.parametrize("train", ["B", "A"])
def test_a_first_factor_is_of_the_singular_vectors_of_the_mean_gradient(train: str) -> None:
    world = make_world()
    done = run(world, first("fed_rac_lora", {"train": train}), FULL_BATCH, rounds=1)
    assert_equal_trees(done.weights, world.base)
    label = "A" if train == "B" else "B"
    for name, G in gradients(world).items():
        U, _, Vt = torch.linalg.svd(G)
        found = done.strategy.state.carried[f"{name}/{label}"]
        wanted = (Vt if label == "A" else U.mT)[:RANK]
        overlap = ((found if label == "A" else found.mT) @ wanted.mT).abs()
        torch.testing.assert_close(overlap, torch.eye(RANK).double(), rtol=0, atol=1e-8)


@pytest.mark.short(when=lambda name: name != "fed_rac_lora")
@firsts
def test_what_it_costs_is_the_formula_and_it_goes_on(
    name: str, more: dict[str, Any], tmp_path: Path
) -> None:
    world, method = make_world(), first(name, more)
    whole = run(world, method, RAGGED, rounds=5, cohort=3, chunk=1, folder=tmp_path / "whole")
    for round_, row in enumerate(whole.rows, start=1):
        up, down = method.floats(world.plan, round_)
        assert row["uplink_bytes"] == 3 * ITEM * up
        seeds = row["downlink_bytes"] - 3 * ITEM * down
        assert seeds % SEED_BYTES == 0
        assert 0 <= seeds <= 3 * 2 * SEED_BYTES * len(world.plan.targets)
    losses = [row["metrics"]["loss"] for row in whole.rows]
    assert losses[0] == world.loss(world.base) > losses[1]
    assert_updates_lead_on(tmp_path / "whole")
    for stop in (1, 2):
        folder = tmp_path / str(stop)
        run(world, method, RAGGED, rounds=stop, cohort=3, chunk=1, folder=folder)
        again = run(world, method, RAGGED, rounds=5, cohort=3, chunk=1, folder=folder, resume=True)
        assert_equal_trees(again.weights, whole.weights)


@firsts
def test_a_first_link_is_as_long_as_a_drawn_one_and_stays(name: str, more: dict[str, Any]) -> None:
    """Its factor has the lengths of a drawing's, and the same bits in all rounds of the link."""
    world, method, draw = make_world(), first(name, more), Draw(1)
    done = run(world, method, RAGGED, rounds=3, cohort=3, chunk=3)
    asked = [unpack_downlink(content)[0] for content in done.worker.asked]
    rounds = [d for d in asked if d.program.trains]
    assert [d.link for d in rounds] == ([0, 0] if method.link_rounds != 1 else [0, 1])
    drawn = replace(method, init="random")
    state = drawn.initial_state(world.base, world.plan, draw)
    sent = drawn.open_round(state, 1, Cohort(torch.arange(2), torch.ones(2)), draw)
    for weight, adapter in rounds[0].adapters.items():
        (label,) = (k for k, f in adapter.factors.items() if not f.trained)
        A, spec = adapter.factors[label].numbers, sent.adapters[weight].factors[label].drawing
        assert A is not None
        assert spec is not None
        gram = A @ A.mT if label == "A" else A.mT @ A
        own = gram.diagonal() if name == "subspace_rac_lora" else torch.tensor(spec.gram_scale)
        torch.testing.assert_close(gram, own * torch.eye(spec.rank).double())
        if method.link_rounds != 1:
            assert torch.equal(rounds[1].adapters[weight].factors[label].draw(), A)


def test_a_first_factor_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="again from their seeds"):
        accepted("method", make_method("pool_rac_lora", init="gradient"))
    with pytest.raises(ConfigError, match=r"method\.init=gradient .*method\.fresh"):
        accepted("method", make_method("subspace_rac_lora", init="gradient", fresh=1.0))
    with pytest.raises(ConfigError, match=r"method\.init"):
        make_method("fed_rac_lora", init="gradients")


@pytest.mark.parametrize("rule", [Uniform(), HeteroLora()])
def test_a_server_optimizer_of_factors_is_refused_beside_a_probe(rule: Uniform) -> None:
    """Its moments would begin with gradients, in shapes that nothing has afterwards."""
    world = make_world()
    initial = "lora_ga" if type(rule) is Uniform else "orthogonal"
    method = allocated(make_method("fedavg_lora", rank=RANK, init=initial), rule)
    optimizer = Momentum(space="factors")
    with pytest.raises(ConfigError, match="clients send gradients first"):
        run(world, method, RAGGED, rounds=1, treatment={"server_optimizer": optimizer})
    dense = {"server_optimizer": replace(optimizer, space="weights")}
    done = run(world, method, RAGGED, rounds=3, treatment=dense)
    assert done.rows[-1]["metrics"]["loss"] < world.loss(world.base)
