"""HeteroLoRA around methods: which layers train, that nothing else changes, bytes, resuming."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from test_round_failures import faulty
from worlds import (
    FULL_BATCH,
    RAGGED,
    World,
    assert_close_trees,
    assert_equal_trees,
    conv1d,
    distance,
    distinct,
    linear,
    make_method,
    make_world,
    run,
)

from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.allocation import CHOOSES_LAYERS, AdaLora, HeteroLora, Uniform, flows
from fedraclora.compatibility import Features, refuse
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import (
    DOES_MORE,
    OTHER_LAYERS,
    Cohort,
    Draw,
    Method,
    RoundInstructions,
)
from fedraclora.strategies.steps.scaffold import ControlVariates
from fedraclora.strategies.wrappers.allocated import Allocated, allocated
from fedraclora.strategies.wrappers.around import inside
from tests.messages import unpack_downlink

LAYERS = {"linear": linear, "conv1d": conv1d}


def heterolora(name: str, rule: dict[str, Any] | None = None, **changes: Any) -> Allocated:
    made = allocated(make_method(name, **changes), HeteroLora(**{"share": 0.67} | (rule or {})))
    assert isinstance(made, Allocated)
    return made


def asked(done: Any) -> list[tuple[int, str, tuple[str, ...]]]:
    """Round, recipe and adapted layers of each exchange, each once."""
    found = []
    for content in done.worker.asked:
        downlink, order = unpack_downlink(content)
        line = (order.round_, downlink.program.name, tuple(downlink.adapters))
        if not found or found[-1] != line:
            found.append(line)
    return found


def test_without_a_rule_a_method_is_itself() -> None:
    method = make_method("fedavg_lora")
    assert allocated(method, Uniform()) is method


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_scored_by_the_gradient_of_the_mean_loss(layer: str) -> None:
    """Under Fed-RAC-LoRA the score is ||s G A^T||, G of all samples: dense autograd's."""
    world = make_world(LAYERS[layer])
    method = heterolora("fed_rac_lora", {"share": 0.34})
    done = run(world, method, FULL_BATCH, rounds=1)
    values = {n: t.clone().requires_grad_() for n, t in world.base.items()}
    samples = world.task.test
    output = torch.func.functional_call(world.task.model, values, (samples.inputs["x"],))
    torch.nn.functional.cross_entropy(output, samples.target).backward()
    state = method.initial_state(world.base, world.plan, Draw(1))
    cohort = Cohort(torch.arange(5), torch.ones(5))
    scores = {}
    for name, adapter in method.open_round(state, 1, cohort, Draw(1)).adapters.items():
        A, gradient = adapter.factors["A"], values[name].grad
        assert A.drawing is not None
        assert gradient is not None
        G = world.plan.targets[name].matrix(gradient)
        scores[name] = float(torch.linalg.norm(adapter.scale * G @ A.draw().mT))
    best = max(scores, key=lambda name: scores[name])
    assert max(scores.values()) > 1.01 * sorted(scores.values())[-2]
    assert asked(done)[-1] == (1, "plain", (best,))


def avoided(world: World, method: Method) -> list[str]:
    """What a method has, and sends first, that the rule does not go with."""
    sent = opened(world, method)
    features = Features([method], sent)
    found = [name for name in CHOOSES_LAYERS.avoids if features.has(name)]
    found += [] if sent.program.plain else [DOES_MORE.name]
    whole = sent.adapters.keys() == world.plan.targets.keys()
    return found if whole else [*found, OTHER_LAYERS.name]


@pytest.mark.parametrize("name", distinct())
def test_chosen_layers_train_and_the_others_stay_or_the_method_is_refused(name: str) -> None:
    world = make_world()
    if reasons := avoided(world, make_method(name)):
        with pytest.raises(ConfigError, match=f"=heterolora does .*({'|'.join(reasons)})"):
            opened(world, heterolora(name), HeteroLora())
        return
    done = run(world, heterolora(name), RAGGED, rounds=4)
    exchanges = asked(done)
    assert [(r, recipe) for r, recipe, _ in exchanges[:2]] == [(1, "gradient"), (1, "plain")]
    assert exchanges[0][2] == tuple(world.plan.targets)
    chosen = exchanges[1][2]
    assert len(chosen) == 2
    assert {e[2] for e in exchanges[1:]} == {chosen}
    for target in world.plan.targets:
        moved = distance(done.weights, world.base, [target]) > 1e-8
        assert moved == (target in chosen)
    assert distance(done.weights, world.base, list(world.plan.dense)) > 1e-8
    losses = [row["metrics"]["loss"] for row in done.rows]
    assert losses[-1] < losses[0] < world.loss(world.base)


@pytest.mark.parametrize("name", distinct())
def test_with_all_layers_chosen_a_rule_changes_nothing(name: str) -> None:
    world = make_world()
    if avoided(world, make_method(name)):
        return
    ruled = run(world, heterolora(name, {"share": 1.0}), RAGGED, rounds=3, cohort=3)
    plain = run(world, make_method(name), RAGGED, rounds=3, cohort=3)
    assert_equal_trees(ruled.weights, plain.weights)
    for left, right in zip(ruled.rows[1:], plain.rows[1:], strict=True):
        for key in ("uplink_bytes", "downlink_bytes", "catchup_bytes"):
            assert left[key] == right[key]


def test_layers_may_be_chosen_anew() -> None:
    world = make_world()
    method = heterolora("fed_rac_lora", {"every": 2})
    done = run(world, method, replace(RAGGED, epochs=2), rounds=7, cohort=2)
    exchanges = asked(done)
    assert [r for r, recipe, _ in exchanges if recipe == "gradient"] == [1, 3, 5, 7]
    trained = {r: layers for r, recipe, layers in exchanges if recipe == "plain"}
    assert trained[1] == trained[2]
    assert trained[3] == trained[4]
    assert all(len(layers) == 2 for layers in trained.values())
    assert len(set(trained.values())) > 1


def test_what_choosing_costs_is_in_the_ledger() -> None:
    world, item = make_world(), 8
    method = heterolora("fedavg_lora", {"share": 0.34})
    done = run(world, method, RAGGED, rounds=2, cohort=3, chunk=1)
    chosen = asked(done)[-1][2]
    sizes = {n: 3 * sum(v.shape) for n, v in world.plan.targets.items()}  # r (m + n)
    dense = sum(world.base[n].numel() for n in world.plan.dense)
    trained = sum(sizes[n] for n in chosen) + dense
    ups = [row["uplink_bytes"] for row in done.rows]
    assert ups == [3 * item * (sum(sizes.values()) + trained), 3 * item * trained]
    assert done.rows[0]["report"]["adapted_layers"] == 1


def test_snip_takes_a_start_of_both_factors() -> None:
    world = make_world()
    with pytest.raises(ConfigError, match="scores every layer 0"):
        run(world, heterolora("fedavg_lora", {"proxy": "snip"}), RAGGED, rounds=1)
    method = heterolora("fedavg_lora", {"proxy": "snip"}, init="orthogonal")
    done = run(world, method, RAGGED, rounds=2)
    assert len(asked(done)[-1][2]) == 2
    left = set(world.plan.targets) - set(asked(done)[-1][2])
    assert_close_trees(
        {n: done.weights[n] for n in left}, {n: world.base[n] for n in left}, tolerance=1e-14
    )


def test_synflow_asks_no_client() -> None:
    world = make_world()
    inner = make_method("fedavg_lora", init="orthogonal")
    flow = partial(flows, world.task.model, world.task.test)
    rule = HeteroLora(proxy="synflow", share=0.34)
    method = allocated(inner, rule, flow=flow)
    done = run(world, method, RAGGED, rounds=3, cohort=3)
    assert {(recipe, len(layers)) for _, recipe, layers in asked(done)} == {("plain", 1)}
    state = inner.initial_state(world.base, world.plan, Draw(1))
    cohort = Cohort(torch.arange(3), torch.ones(3))
    scores = flow(state.base, inner.open_round(state, 1, cohort, Draw(1)), world.plan)
    assert asked(done)[-1][2] == (max(scores, key=lambda name: scores[name]),)
    with pytest.raises(ConfigError, match="scores every layer 0"):
        opened(world, allocated(make_method("fedavg_lora"), rule, flow=flow))


def test_a_client_that_fails_in_the_probe_is_not_asked_to_train() -> None:
    world = faulty(raising=(4,))
    method = heterolora("fedavg_lora")
    done = run(world, method, RAGGED, rounds=1, chunk=1, max_failures=1, weights="uniform")
    assert [f["client"] for f in done.rows[0]["failures"]] == [4]
    assert asked(done)[-1][1] == "plain"


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_first_factors_out_of_the_weights_are_refused(init: str) -> None:
    with pytest.raises(ConfigError, match=r"=heterolora does .*first factors out of the weights"):
        opened(make_world(), heterolora("fedavg_lora", init=init), HeteroLora())


def opened(world: World, method: Method, *beside: object) -> RoundInstructions:
    """What is sent first, if all goes together."""
    refuse(Features([*inside(method), *beside]).conflicts())
    draw = Draw(1)
    state = method.initial_state(world.base, world.plan, draw)
    return method.open_round(state, 1, Cohort(torch.arange(3), torch.ones(3)), draw)


def test_methods_that_carry_factors_are_asked_once() -> None:
    method = heterolora("fedavg_lora", {"every": 2})
    with pytest.raises(ConfigError, match=r"allocation\.every.*allocation\.every=2"):
        run(make_world(), method, RAGGED, rounds=1)


def test_layers_are_chosen_again_only_for_methods_that_merge_after_every_round() -> None:
    """Said of the config, before a round shows that the method carries factors."""
    rule = HeteroLora(every=2)
    assert not [*Features([rule, make_method("fed_rac_lora")]).conflicts()]
    for method in (make_method("fedavg_lora"), make_method("fed_rac_lora", merge_every=3)):
        (said,) = Features([rule, method]).conflicts()
        assert "allocation.every needs a method that merges after every round" in said
    last = "a method that starts from the factors of the last merge"
    for method in filter(lambda m: Features([m]).has(last), map(make_method, distinct())):
        assert any(last in said for said in Features([rule, method]).conflicts())
    assert not [*Features([HeteroLora(), make_method("fedavg_lora")]).conflicts()]


@pytest.mark.parametrize("kept", [Momentum(space="factors"), ControlVariates()])
@pytest.mark.parametrize("rule", [HeteroLora(), AdaLora()], ids=lambda r: r.name)
def test_what_the_server_keeps_by_coordinates_is_refused_beside_a_rule(
    rule: Uniform, kept: object
) -> None:
    method = make_method("fedavg_lora")
    assert not [*Features([method, kept, Uniform()]).conflicts()]
    for part in (rule, allocated(method, rule)):
        (said,) = Features([method, kept, part]).conflicts()
        assert "rank allocation" in said
