"""DoRA around methods: what is averaged and how, what is refused, bytes, runs that go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_method_bytes import array_bytes, seeds
from worlds import (
    RAGGED,
    WALKING,
    World,
    assert_close_trees,
    assert_equal_trees,
    client_weights,
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
    variants,
)

from fedraclora.aggregation.base import Total
from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.allocation import HeteroLora
from fedraclora.compatibility import Features
from fedraclora.devices.distributions import LogNormal
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.lowrank.dora import magnitudes as among
from fedraclora.lowrank.layers import LayerView
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import SecAgg
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.factor import SEED_BYTES
from fedraclora.protocol.method import Draw, Plan, RoundInstructions, State
from fedraclora.strategies.wrappers.allocated import allocated
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree
from fedraclora.wire.exchange import TrainRequest
from tests.messages import pack_downlink, unpack_downlink

Variant = tuple[str, dict[str, Any]]
DRAW = Draw(17)
LAYERS = {"linear": linear, "conv1d": conv1d}


def fits(variant: Variant) -> bool:
    return variant[0] not in WALKING and not make_method(variant[0], **variant[1]).traits.merges


FITTING = [v for v in variants() if fits(v) and v[1].get("init") != "lora_ga"]
MERGING = [v for v in variants() if not fits(v)]
PERSONAL = [v for v in FITTING if make_method(v[0], **v[1]).client_state]
every_fitting = pytest.mark.parametrize("variant", FITTING, ids=label)


def dora(name: str, **changes: Any) -> Dora:
    return Dora(make_method(name, **changes))


def scaled_by(sent: RoundInstructions) -> dict[str, str]:
    """Magnitudes by the weight whose rows they scale."""
    return among(sent.adapters, sent.dense)


def magnitudes(state: State) -> Tree:
    return {n: t for n, t in state.carried.items() if n.endswith(".magnitude")}


def turned(weights: Tree, lengths: Tree, plan: Plan) -> Tree:
    """Give the rows of weights these lengths, written out."""
    out = dict(weights)
    for name, view in plan.targets.items():
        W = weights[name].T if view.kind == "conv1d" else weights[name]
        m = lengths[name.replace("weight", "magnitude")]
        new = torch.stack([m[i] * row / row.norm() for i, row in enumerate(W)])
        out[name] = new.T if view.kind == "conv1d" else new
    return out


def test_methods_of_all_kinds_fit() -> None:
    names = {name for name, _ in FITTING}
    assert {"fedavg_lora", "ffa_lora", "rolora", "fedsa_lora", "hetlora", "fed_sb"} <= names
    assert {"fed_rac_lora", "flora_stacking", "fedex_lora", "fedavg"} <= {n for n, _ in MERGING}


@every_fitting
@pytest.mark.parametrize("layer", LAYERS)
def test_the_start_is_the_method_s(layer: str, variant: Variant) -> None:
    method, small = dora(variant[0], **variant[1]), make_world(LAYERS[layer])
    state = method.initial_state(small.base, small.plan, DRAW)
    assert_close_trees(method.weights(state, DRAW), small.base)
    rows = [view.shape[0] for view in small.plan.targets.values()]
    assert [len(t) for t in magnitudes(state).values()] == rows


@pytest.mark.parametrize("variant", [*FITTING, ("ffa_lora", {"server_lr": 1.75})], ids=label)
def test_magnitudes_are_means_and_the_rest_is_the_method_s(variant: Variant) -> None:
    method, small = dora(variant[0], **variant[1]), make_world(conv1d)
    step = method.traits.step
    for played in play_rounds(method, small, 3, DRAW):
        before, rest = (
            {n: t for n, t in s.carried.items() if not n.endswith(".magnitude")}
            for s in (played.before, played.after)
        )
        plain = replace(played.before, carried=before)
        inner = method.inner.close_round(plain, played.sent, played.uplinks)
        assert_equal_trees(rest, inner.carried)
        assert_equal_trees(played.after.base, inner.base)
        share, rows = played.uplinks.weights / played.uplinks.weights.sum(), played.uplinks.stack()
        new, old = magnitudes(played.after), magnitudes(played.before)
        assert_close_trees(
            new, {n: m + step * (share @ rows[n] - m) for n, m in old.items()}, 1e-14
        )
        wanted = turned(method.inner.weights(inner, DRAW), new, small.plan)
        assert_close_trees(method.weights(played.after, DRAW), wanted)


def test_no_method_is_exact(world: World) -> None:
    """Not even FFA-LoRA, though every client has the same A: lengths are not linear in B."""
    method = dora("ffa_lora")
    (played,) = play_rounds(method, world, 1, DRAW)
    assert method.inner.traits.exact
    assert not method.traits.exact
    rows, share = played.uplinks.stack(), played.uplinks.weights / played.uplinks.weights.sum()
    each = []
    for k, V in enumerate(client_weights(played, k) for k in range(len(share))):
        lengths = {n: rows[n][k] for n in scaled_by(played.sent).values()}
        each.append(turned(V, lengths, world.plan))
    found, names = method.weights(played.after, DRAW), list(world.plan.targets)
    mean = {n: sum(p * W[n] for p, W in zip(share, each, strict=True)) for n in names}
    assert distance(found, mean, names) > 0.01  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", PERSONAL, ids=label)
def test_a_client_s_own_weights_have_the_shared_lengths(variant: Variant, world: World) -> None:
    method = dora(variant[0], **variant[1])
    done = run(world, method, RAGGED, rounds=3, cohort=3)
    state, draw = done.strategy.state, done.strategy.draw
    for own in done.worker.store.latest(world.clients).values():
        assert not [n for n in own if n.endswith("magnitude")]
        mine = method.inner.weights(state, draw, own)
        found = method.weights(state, draw, own)
        assert_close_trees(found, turned(mine, magnitudes(state), world.plan))


@forms_short
@every_fitting
def test_bytes_are_the_formula_and_the_messages(variant: Variant, world: World) -> None:
    method, cohort, rounds = dora(variant[0], **variant[1]), 3, 4
    done = run(world, method, RAGGED, rounds=rounds, cohort=cohort, chunk=1)
    rows = sum(view.shape[0] for view in world.plan.targets.values())
    for round_ in range(1, rounds + 1):
        row, places = done.rows[round_ - 1], slice((round_ - 1) * cohort, round_ * cohort)
        up, down = method.floats(world.plan, round_)
        plain = method.inner.floats(world.plan, round_)
        assert (up, down) == (plain[0] + rows, plain[1] + rows)
        answered, asked = done.worker.answered[places], done.worker.asked[places]
        assert row["uplink_bytes"] == 8 * up * cohort == sum(map(array_bytes, answered))
        sent = sum(array_bytes(c) + SEED_BYTES * seeds(c) for c in asked)
        assert row["downlink_bytes"] == sent
        assert sum(map(array_bytes, asked)) == 8 * down * cohort


def test_a_message_brings_the_magnitudes(world: World) -> None:
    method = dora("fedavg_lora")
    state = method.initial_state(world.base, world.plan, DRAW)
    sent = method.open_round(state, 1, some_cohort(), DRAW)
    request = TrainRequest(1, 0, 1.0, some_cohort().clients)
    got, _ = unpack_downlink(pack_downlink(sent, request, "float64"))
    assert scaled_by(got) == scaled_by(sent)
    assert list(scaled_by(got)) == list(world.plan.targets)
    for name in scaled_by(got).values():
        assert torch.equal(got.dense[name].opening(), state.carried[name])  # type: ignore[arg-type]
        assert got.dense[name].main


@forms_short
@every_fitting
def test_training_goes_on_from_what_was_learnt(variant: Variant, world: World) -> None:
    done = run(
        world,
        dora(variant[0], **variant[1]),
        LocalSettings(lr=0.05, steps=3, batch_size=32),
        rounds=6,
    )
    losses = [row["metrics"]["loss"] for row in done.rows]
    assert losses == sorted(losses, reverse=True)
    first = done.strategy.method.initial_state(world.base, world.plan, done.strategy.draw)
    for name, old in magnitudes(first).items():
        assert not torch.equal(done.strategy.state.carried[name], old)


# --- what stands beside a method ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg_lora", "ffa_lora"])
def test_sums_carry_the_magnitudes(name: str, world: World) -> None:
    whole = run(world, dora(name), RAGGED, rounds=3, weights="uniform")
    summed = run(world, dora(name), RAGGED, rounds=3, weights="uniform", aggregator=Total())
    secure = {"secure": SecAgg(clip=50.0, max_weight=1)}
    hidden = run(world, dora(name), RAGGED, rounds=3, weights="uniform", treatment=secure)
    assert_close_trees(summed.strategy.state.carried, whole.strategy.state.carried)
    assert_close_trees(hidden.strategy.state.carried, whole.strategy.state.carried, 1e-5)


def test_privacy_of_clients_bounds_the_magnitudes_with_the_rest(world: World) -> None:
    """A clip of next to nothing and hardly any noise: they stay where they were."""
    private = ClientLevel(clip=1e-6, noise_multiplier=0.5, delta=1e-3)
    treatment = {"privacy": private, "secret": Secret(bytes(range(32)))}
    method = dora("ffa_lora")
    done = run(world, method, RAGGED, rounds=2, weights="uniform", treatment=treatment)
    start = magnitudes(method.initial_state(world.base, world.plan, done.strategy.draw))
    assert_close_trees(magnitudes(done.strategy.state), start, 1e-5)
    free = run(world, method, RAGGED, rounds=2, weights="uniform")
    assert any(
        float((t - start[n]).abs().max()) > 1e-3 for n, t in magnitudes(free.strategy.state).items()
    )


def test_the_server_s_momentum_moves_the_magnitudes(world: World) -> None:
    """With one round of momentum, the step is the mean change."""
    rule = {"server_optimizer": Momentum(space="factors", lr=0.5)}
    method = dora("fedavg_lora")
    plain = run(world, method, RAGGED, rounds=1)
    halved = run(world, method, RAGGED, rounds=1, treatment=rule)
    start = magnitudes(method.initial_state(world.base, world.plan, plain.strategy.draw))
    mean = magnitudes(plain.strategy.state)
    wanted = {n: m + 0.5 * (mean[n] - m) for n, m in start.items()}
    assert_close_trees(magnitudes(halved.strategy.state), wanted)


def test_control_variates_correct_the_magnitudes(world: World) -> None:
    """One full step of all clients: the server's variates are the mean gradients."""
    local, method = LocalSettings(lr=0.1, steps=1, batch_size=0), dora("fedavg_lora")
    treatment = {"control_variates": True}
    done = run(world, method, local, rounds=1, weights="uniform", treatment=treatment)
    start = magnitudes(method.initial_state(world.base, world.plan, done.strategy.draw))
    for name, now in magnitudes(done.strategy.state).items():
        gradient = done.strategy.state.moments[f"variates/{name}"]
        torch.testing.assert_close(now, start[name] - 0.1 * gradient)
        assert float(gradient.abs().max()) > 1e-6


def test_buffered_rounds_carry_the_magnitudes(world: World) -> None:
    uneven = SystemConfig(speed=LogNormal(1.0, 1.2), jitter=0.4, buffer=2)
    method = dora("ffa_lora")
    done = run(
        world,
        method,
        RAGGED,
        rounds=6,
        cohort=4,
        system=uneven,
    )
    start = magnitudes(method.initial_state(world.base, world.plan, done.strategy.draw))
    moved = magnitudes(done.strategy.state)
    assert all(float((t - start[n]).abs().max()) > 1e-4 for n, t in moved.items())
    assert max(row["report"]["staleness_max"] for row in done.rows) > 0


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", MERGING, ids=label)
def test_methods_that_merge_are_refused(variant: Variant) -> None:
    method = make_method(variant[0], **variant[1])
    told = [*Features([method, Dora(method)]).conflicts()]
    assert any("a method that merges updates into the weights" in line for line in told)


def without_a_row(world: World) -> Tree:
    base = {n: t.clone() for n, t in world.base.items()}
    base["fc2.weight"][4] = 0
    return base


def with_an_embedding(world: World) -> Plan:
    view = LayerView("embedding", (6, 7))
    return replace(world.plan, targets=world.plan.targets | {"fc1.weight": view})


LORA = dora("fedavg_lora")
# What a run is given that does not go with DoRA, and key words of the message.
REFUSED: dict[str, tuple[Callable[[World], object], str]] = {
    "a start from gradients": (
        lambda world: run(world, dora("fedavg_lora", init="lora_ga"), RAGGED, rounds=1),
        r"dora=true .*gradients.*dora=false",
    ),
    "a pull to the start": (
        lambda world: run(world, LORA, LocalSettings(lr=0.1, prox=0.5), rounds=1),
        r"local\.prox=0\.5.*dora=false",
    ),
    "an allocation": (
        lambda world: run(
            world,
            Dora(allocated(make_method("fedavg_lora"), HeteroLora())),
            RAGGED,
            rounds=1,
        ),
        "allocation=none, or dora=false",
    ),
    "a server's step on weights": (
        lambda world: run(
            world, LORA, RAGGED, rounds=1, treatment={"server_optimizer": Momentum(space="weights")}
        ),
        r"dora=true: .*space=factors",
    ),
    "a row of zeros": (
        lambda world: LORA.initial_state(without_a_row(world), world.plan, DRAW),
        r"row 4 of fc2\.weight",
    ),
    "an embedding": (
        lambda world: LORA.initial_state(world.base, with_an_embedding(world), DRAW),
        r"fc1\.weight.*embedding",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_dora_is_refused(what: str, world: World) -> None:
    given, said = REFUSED[what]
    with pytest.raises(ConfigError, match=said):
        given(world)
