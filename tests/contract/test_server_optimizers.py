"""FedOpt over methods: the server's step against dense algebra, written a second time.

A few methods of each kind stand for all; random replies first, then whole runs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import (
    RAGGED,
    Played,
    World,
    assert_close_trees,
    assert_equal_trees,
    conv1d,
    label,
    make_method,
    make_world,
    mean_weights,
    random_replies,
    run,
    some_cohort,
    stepped,
)

from fedraclora.aggregation.server_optimizers import (
    SERVER_OPTIMIZERS,
    Adam,
    Momentum,
    ServerOptimizer,
)
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Draw, Method
from fedraclora.run.rebuild import state_at
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.round_step import RoundSteps, RunContext
from fedraclora.strategies.steps import round_steps
from fedraclora.tree import Tree
from fedraclora.weights.chain import CatchUp
from tests.reference.chain import replay

Variant = tuple[str, dict[str, Any]]
DRAW = Draw(seed=17)
RULES = [SERVER_OPTIMIZERS[n]() for n in ("momentum", "adagrad", "adam", "yogi")]
EXACT: list[Variant] = [
    ("fed_rac_lora", {}),
    ("fed_rac_lora", {"train": "A", "merge_every": 3}),
    ("fed_rac_lora", {"sketches": 2, "server_lr": 2.0}),
    ("ffa_lora", {}),
    ("flora_stacking", {}),
    ("fedmomentum", {}),
    ("rolora", {}),
    ("fedavg", {}),
]
ADDED: list[Variant] = [("fedavg_lora", {}), ("fedavg_lora", {"merge_every": 2}), ("frlora", {})]
FACTORS: list[Variant] = [
    ("fed_rac_lora", {}),
    ("fed_rac_lora", {"sketch": "gaussian", "train": "A"}),
    ("fed_rac_lora", {"merge_every": 2}),
    ("ffa_lora", {}),
    ("rolora", {}),
]


@pytest.fixture(scope="module")
def world() -> World:
    """Layers stored (in, out): what is projected is projected on the right side of each."""
    return make_world(conv1d)


def rounds(method: Method, world: World, rule: ServerOptimizer, count: int = 4) -> list[Played]:
    """Rounds of random replies that the server closes with its optimizer."""
    state, loop = (
        method.initial_state(world.base, world.plan, DRAW),
        LoopConfig(count, 5, 5, 5, DRAW.seed),
    )
    devices = DeviceSimulator(SystemConfig(), DRAW.seed, RAGGED)
    chosen = round_steps({"server_optimizer": rule, "local": RAGGED})
    steps = RoundSteps(chosen, RunContext(method, RAGGED, loop, devices), state)
    played = []
    for round_ in range(1, count + 1):
        sent = method.open_round(state, round_, some_cohort(), DRAW)
        got = random_replies(sent, some_cohort(), world.dtype, round_)
        exchange = Exchange(sent, round_, 0, some_cohort(), some_cohort(), loop)
        after = steps.close(partial(method.close_round, state, sent), state, exchange, got)
        played.append(Played(state, sent, got, after))
        state = after
    return played


class Reference:
    """The formulas once more, coordinate by coordinate, on whatever is handed in."""

    def __init__(self, rule: ServerOptimizer) -> None:
        self.rule = rule
        self.m: Tree = {}
        self.v: Tree = {}

    def step(self, change: Tree) -> Tree:
        out = {}
        for name, d in change.items():
            if isinstance(self.rule, Momentum):
                self.m[name] = self.rule.beta * self.m.get(name, 0 * d) + d
                out[name] = self.rule.lr * self.m[name]
                continue
            b1 = self.rule.beta1  # type: ignore[attr-defined]
            b2, tau = getattr(self.rule, "beta2", None), self.rule.tau  # type: ignore[attr-defined]
            self.m[name] = b1 * self.m.get(name, 0 * d) + (1 - b1) * d
            v = self.v.get(name, tau**2 + 0 * d)
            if self.rule.name == "adagrad":
                v = v + d**2
            elif self.rule.name == "adam":
                v = b2 * v + (1 - b2) * d**2
            else:
                v = torch.where(v > d**2, v - (1 - b2) * d**2, v + (1 - b2) * d**2)
            self.v[name] = v
            out[name] = self.rule.lr * self.m[name] / (v**0.5 + tau)  # type: ignore[attr-defined]
        return out


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("variant", EXACT, ids=label)
def test_in_weights_the_server_follows_the_mean_of_the_clients_weights(
    variant: Variant, rule: ServerOptimizer, world: World
) -> None:
    method, reference = make_method(variant[0], **variant[1]), Reference(rule)
    for played in rounds(method, world, rule):
        old = method.weights(played.before, DRAW)
        mean = stepped(method, played, mean_weights(played), DRAW)
        step = reference.step({n: mean[n] - old[n] for n in old})
        assert_close_trees(method.weights(played.after, DRAW), {n: old[n] + step[n] for n in old})


@pytest.mark.parametrize("variant", ADDED, ids=label)
def test_in_weights_an_inexact_method_is_followed_as_it_is(variant: Variant, world: World) -> None:
    rule = Momentum(lr=0.7, beta=0.5)
    method, reference = make_method(variant[0], **variant[1]), Reference(rule)
    for played in rounds(method, world, rule):
        old = method.weights(played.before, DRAW)
        plain = method.close_round(played.before, played.sent, played.uplinks)
        new = method.weights(plain, DRAW)
        step = reference.step({n: new[n] - old[n] for n in old})
        assert_close_trees(method.weights(played.after, DRAW), {n: old[n] + step[n] for n in old})
        assert_equal_trees(played.after.carried, plain.carried)


@pytest.mark.parametrize("variant", [*EXACT, *ADDED], ids=label)
def test_in_weights_links_are_dense_and_rebuild_the_base(variant: Variant, world: World) -> None:
    """What the downlink costs: every changed weight in full, for all methods alike."""
    method = make_method(variant[0], **variant[1])
    first = method.initial_state(world.base, world.plan, DRAW).base
    links, catch_up = [], CatchUp(first, 3)
    for played in rounds(method, world, Momentum()):
        assert played.after.link is not None
        assert not played.after.link.terms
        # The first step is the mean itself: what a method carries needs nothing folded in.
        assert not links or set(world.plan.targets) <= set(played.after.link.dense)
        links.append(played.after.link)
        assert_equal_trees(replay(first, links, world.plan), played.after.base)
    catch_up.add(links[1])
    numbers = sum(world.base[n].numel() for n in links[1].dense)
    assert catch_up.missing(torch.tensor([1])).tolist() == [8 * numbers]


def projection(played: Played, weight: str, world: World) -> tuple[torch.Tensor, bool]:
    """The projection on what the round trains of a weight, and whether it acts on the left."""
    factors = played.sent.adapters[weight].factors
    right = not factors["A"].trained
    frozen = factors["A" if right else "B"]
    F = frozen.draw().double()
    return (torch.linalg.pinv(F) @ F, False) if right else (F @ torch.linalg.pinv(F), True)


@pytest.mark.parametrize("variant", FACTORS, ids=label)
def test_in_factors_momentum_is_projected_on_what_the_round_trains(
    variant: Variant, world: World
) -> None:
    """D <- beta P(D) + mean change; W <- W + lr D. RoLoRA has such a D for B and one for A."""
    rule = Momentum(lr=0.6, beta=0.8, space="factors")
    method = make_method(variant[0], **variant[1])
    held: Tree = {}
    for played in rounds(method, world, rule, count=5):
        old = method.weights(played.before, DRAW)
        mean = mean_weights(played)
        wanted = {}
        for name, weight in old.items():
            change, key = mean[name] - weight, name
            before = held.get(name, torch.zeros_like(weight))
            if name in world.plan.targets:
                P, left = projection(played, name, world)
                key = f"{name}/{left}"
                before = held.get(key, torch.zeros_like(weight)).T  # stored (in, out)
                before = (P @ before if left else before @ P).T
            held[key] = rule.beta * before + change
            wanted[name] = weight + rule.lr * held[key]
        assert_close_trees(method.weights(played.after, DRAW), wanted)


def test_in_factors_links_and_bytes_are_those_of_the_method(world: World) -> None:
    method = make_method("fed_rac_lora")
    plain = rounds(method, world, ServerOptimizer())
    moved = rounds(method, world, Momentum(space="factors"))
    for left, right in zip(plain, moved, strict=True):
        one, two = (CatchUp(world.base, 1) for _ in range(2))
        one.add(left.after.link)
        two.add(right.after.link)
        assert one.missing(torch.tensor([0])) == two.missing(torch.tensor([0]))
        assert left.sent.adapters == right.sent.adapters
    kept = [p.after.report.get("momentum_kept") for p in moved]
    assert kept[0] is None
    assert all(k is not None and 0 < k < 1 for k in kept[1:])


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_both_spaces_are_one_where_weights_are_what_is_trained(rule: str, world: World) -> None:
    method = make_method("fedavg")
    ends = [
        rounds(method, world, SERVER_OPTIMIZERS[rule](space=space))[-1].after.base  # type: ignore[call-arg]
        for space in ("weights", "factors")
    ]
    assert_close_trees(*ends)


@pytest.mark.parametrize("name", ["fedavg_lora", "fed_sb", "ffa_lora"])
def test_in_factors_that_live_on_adam_is_adam_on_them(name: str, world: World) -> None:
    rule = Adam(space="factors")
    method, reference = make_method(name), Reference(rule)
    before: Tree = {}
    for played in rounds(method, world, rule, count=3):
        mean = played.uplinks.mean()
        start = {
            n: before.get(n, o if (o := s.opening()) is not None else played.before.base.get(n, 0))
            for n, s in played.sent.uploaded().items()
        }
        step = reference.step({n: mean[n] - start[n] for n in mean})
        again = method.open_round(played.after, 9, some_cohort(), DRAW)
        for n, slot in again.uploaded().items():
            found = played.after.base[n] if slot.blank else slot.opening()
            torch.testing.assert_close(found, start[n] + step[n], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("space", ["weights", "factors"])
def test_no_momentum_and_a_step_of_one_is_the_method_itself(space: str, world: World) -> None:
    method = make_method("fed_rac_lora")
    rule = Momentum(lr=1.0, beta=0.0, space=space)
    found, plain = (rounds(method, world, r)[-1].after for r in (rule, ServerOptimizer()))
    assert_close_trees(found.base, plain.base)
    assert found.report["server_step"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("variant", "rule", "told"),
    [
        (("fedsa_lora", {}), Momentum(), "does not have the clients' weights"),
        (("flora_stacking", {}), Momentum(space="factors"), "each client's update"),
        (("frlora", {}), Momentum(space="factors"), "restarts its factors at each merge"),
        (("fed_rac_lora", {}), Adam(space="factors"), "or server_optimizer=momentum"),
        (("rolora", {}), Adam(space="factors"), "or server_optimizer=momentum"),
        (("pool_rac_lora", {}), Adam(space="factors"), "or server_optimizer=momentum"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_what_cannot_be_optimized_is_refused(
    variant: Variant, rule: ServerOptimizer, told: str, world: World
) -> None:
    with pytest.raises(ConfigError, match=told):
        rounds(make_method(variant[0], **variant[1]), world, rule)


@pytest.mark.parametrize("rule", [Momentum(space="factors"), Adam()], ids=lambda r: r.name)
@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg_lora"])
def test_replies_may_come_in_any_order(name: str, rule: ServerOptimizer, tmp_path: Path) -> None:
    world, method = make_world(dtype=torch.float32), make_method(name)
    more: dict[str, Any] = {"rounds": 3, "cohort": 3, "treatment": {"server_optimizer": rule}}
    whole = run(world, method, RAGGED, **more, folder=tmp_path)
    turned = run(world, method, RAGGED, **more, arrange=lambda messages: messages[::-1])
    assert_equal_trees(turned.strategy.state.base, whole.strategy.state.base)
    assert_equal_trees(turned.strategy.state.moments, whole.strategy.state.moments)
    assert turned.strategy.recorder.ledger.digest() == whole.strategy.recorder.ledger.digest()
    assert_equal_trees(state_at(tmp_path, 3).base, whole.strategy.state.base)
    assert whole.rows[-1]["report"]["server_step"] > 0


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("name", ["ffa_lora", "fedavg_lora", "pool_rac_lora", "xgblora"])
def test_last_bits_do_not_decide_what_a_round_sends(name: str, beta: float) -> None:
    """Chunks add up in other orders; a step that is the mean change adds nothing to the base."""
    rule, found = {"server_optimizer": Momentum(beta=beta)}, []
    for chunk in (1, 2, 3):
        more: dict[str, Any] = {"rounds": 4, "cohort": 3, "chunk": chunk, "treatment": rule}
        rows = run(make_world(), make_method(name), RAGGED, **more).rows
        found.append([row["catchup_bytes"] for row in rows])
    assert found[0] == found[1] == found[2]
