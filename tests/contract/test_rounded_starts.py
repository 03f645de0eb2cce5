"""Rounding against every method with a first factor: refused, or what a second opinion makes of it.

`tests.reference.rounded` follows whole runs in plain NumPy.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from worlds import (
    RAGGED,
    SIZES,
    WALKING,
    Run,
    World,
    assert_close_trees,
    distinct,
    divide,
    fill,
    forms_short,
    label,
    make_method,
    make_world,
    run,
    trains_parts,
    variants,
    world_of,
    yaml_of,
)

from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Method
from fedraclora.protocol.quantized import ROUNDED
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SKETCHES
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.shared.initials import STARTS
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.training.extras.settings import LocalSettings
from tests.messages import unpack_downlink
from tests.reference import rounded as oracle
from tests.reference.rounded import Asked, Close, RoundedRun

RANK, ALPHA, SCALE = 2, 5.0, 2.5
STEPS = LocalSettings(lr=0.05, steps=2, batch_size=0, shuffle=False)
ROUNDS, SEED = 4, 1


@dataclass(frozen=True)
class Case:
    """What the second opinion knows of a method.

    Attributes:
        close: What a round makes of a layer.
        more: Hyperparameters of the method.
        run: Settings of the second opinion.
    """

    close: Close
    more: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


CASES = {
    "fedavg_lora": Case(oracle.means),
    "fed_cola": Case(oracle.links_of(1)),
    "fed_relora": Case(oracle.links_of(2), {"merge_every": 2}),
    "fedloru": Case(oracle.links_of(2), {"merge_every": 2}),
    "fedex_lora": Case(oracle.fedex),
    "fedmomentum": Case(oracle.momentum),
    "fedrot_lora": Case(oracle.rot),
    "flexlora": Case(oracle.flex),
    "flora_stacking": Case(oracle.stacking),
    "hetlora": Case(oracle.het),
    "lora_fair": Case(oracle.fair),
    "xgblora": Case(oracle.links_of(1, 0.5), {"rank": RANK}),
    "rolora": Case(oracle.by_turns),
    "fedsa_lora": Case(oracle.means, run={"keeps": ("B",)}),
    "fedsvd": Case(oracle.fedsvd),
    "fed_sb": Case(oracle.means),
    "ravan": Case(oracle.means, {"heads": 2}, {"blocks": 2, "recipe": "block_diagonal"}),
}
MERGED = {"fed_cola", "fed_relora", "fedloru", "flora_stacking", "xgblora"}
LASTING = [n for n in CASES if n not in MERGED]


@pytest.fixture(scope="module")
def world() -> World:
    """y = W_2 W_1 x for clients of unequal size; W_1 is 6 x 7, W_2 is 4 x 6."""
    layers = OrderedDict(fc1=nn.Linear(7, 6, bias=False), fc2=nn.Linear(6, 4, bias=False))
    model = fill(nn.Sequential(layers), 3, torch.float64)
    rng = generator(5, "samples")
    x = torch_normal(rng, sum(SIZES), 7)
    samples = Samples({"x": x}, x @ torch_normal(rng, 4, 7).T)
    task = Task(model, (), "squared_error", ("loss",), divide(samples, SIZES), samples)
    return world_of(task, head="full", bias="frozen")


def with_initial(name: str, initial: str | None = None) -> Method:
    more = {"rank": RANK, "alpha": ALPHA} | CASES[name].more
    return make_method(name, **more | ({} if initial is None else {"init": initial}))


def asked_in(done: Run, clients: int) -> list[dict[str, Asked]]:
    """What both ends know of each round, and the names of what is trained in it."""
    found = []
    for content in done.worker.asked[:: -(-clients // 3)]:  # of three clients each
        sent, _ = unpack_downlink(content)
        layers = {}
        for name, adapter in sent.adapters.items():
            begins: dict[str, oracle.Matrix | None] = {}
            for key, factor in adapter.factors.items():
                begins[key] = factor.draw().numpy() if factor.numbers is None else None
            trained = tuple(k for k, f in adapter.factors.items() if f.trained)
            layers[name] = Asked(begins, trained)
        found.append(layers)
    return found


def assert_is_the_oracles(world: World, name: str, initial: str | None, kind: str) -> None:
    """Weights at the end, every evaluation, and what rounding added, of the run and in NumPy."""
    bits = {"uplink": kind, "downlink": kind}
    method, case = with_initial(name, initial), CASES[name]
    # Long drawings take short steps.
    local = STEPS if initial is None else replace(STEPS, lr=0.002)
    done = run(world, method, local, rounds=ROUNDS, seed=SEED, **bits)
    samples = world.task.test
    x, y = samples.inputs["x"].numpy(), samples.target.numpy()
    cuts = np.cumsum([0, *SIZES])
    second = RoundedRun(
        {name: w.numpy().copy() for name, w in world.base.items()},
        SCALE,
        case.close,
        rate=local.lr,
        steps=2,
        data=[(x[a:b], y[a:b]) for a, b in pairwise(cuts)],
        up=kind,
        down=kind,
        seed=SEED,
        **case.run,
    )
    rounds = asked_in(done, world.clients)
    assert len(rounds) == ROUNDS
    for round_, (asked, row) in enumerate(zip(rounds, done.rows, strict=True), start=1):
        second.round(asked, round_)
        assert row["rounding_down"] == pytest.approx(second.off, rel=1e-6)
        if not method.client_state:
            assert row["metrics"]["loss"] == pytest.approx(second.loss(x, y), rel=1e-6)
    strategy, store = done.strategy, done.worker.store
    owned = store.latest(world.clients) if method.client_state else {0: None}
    assert len(owned) == (world.clients if method.client_state else 1)
    for client, own in owned.items():
        found = strategy.method.weights(strategy.state, strategy.draw, own)
        wanted = {n: torch.from_numpy(w) for n, w in second.now(client).items()}
        assert_close_trees(found, wanted, 1e-7)
    moved = sum(float((wanted[n] - w).norm()) for n, w in world.base.items())
    assert moved > 1e-3


@pytest.mark.short(when=lambda kind: kind == "int4")
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_effective_weights_are_the_oracles(name: str, kind: str, world: World) -> None:
    assert_is_the_oracles(world, name, None, kind)


@pytest.mark.short(when=lambda name, initial: (name, initial) == ("fedavg_lora", "gaussian"))
@pytest.mark.parametrize("initial", SKETCHES)
@pytest.mark.parametrize("name", CASES)
def test_of_every_drawing_too(name: str, initial: str, world: World) -> None:
    if (name, initial) == ("fedsvd", "sparse_sign"):
        pytest.skip("a row of this drawing is zero: of V, one is then the library's choice")
    for kind in ("int8", "int4"):
        assert_is_the_oracles(world, name, initial, kind)


def test_there_is_a_case_for_every_method_with_a_first_factor() -> None:
    # Where clients hold other products than the server, the second opinion has nothing to follow.
    names = {name for name in distinct() if not trains_parts(make_method(name))}
    named = {name for name in names if yaml_of(name).get("init", "random") != "random"}
    assert named <= CASES.keys() <= METHODS.keys()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("initial", STARTS)
@pytest.mark.parametrize("name", [*LASTING, "frlora"])
def test_factors_that_hold_a_part_of_the_weights_go_down_in_full(
    name: str, initial: str, world: World
) -> None:
    """Up they may be rounded: what is sent is a change."""
    try:
        method = make_method(name) if name == "frlora" else with_initial(name, initial)
    except ConfigError:
        return  # a start that the method does not have
    for kind in ROUNDED:
        with pytest.raises(
            ConfigError, match=r"compression\.downlink .*ake .*compression\.downlink=float32"
        ):
            run(world, method, STEPS, rounds=1, downlink=kind)
    done = run(world, method, replace(STEPS, lr=1e-9), rounds=2, uplink="int4")
    assert_close_trees(done.weights, world.base, 1e-7)


@pytest.mark.parametrize("name", ["fedavg_lora", "ffa_lora"])
def test_lengths_of_rows_are_not_rounded(name: str) -> None:
    with pytest.raises(ConfigError, match=r"a part of the weights.*dora=false"):
        run(make_world(), Dora(make_method(name)), RAGGED, rounds=1, downlink="int8")


@forms_short
@pytest.mark.parametrize("variant", list(variants()), ids=label)
def test_what_learns_nothing_moves_nothing(variant: tuple[str, dict[str, Any]]) -> None:
    """With a step size of 1e-9 the weights that are measured, first and last, are the first ones.

    Of every method, its biases and head: rounding is relative to what was learnt.
    """
    name, changes = variant
    world, still = make_world(), replace(RAGGED, lr=1e-9, full_lr=1e-9)
    bits = {"uplink": "int4", "downlink": "int4"}
    method = make_method(name, **changes)
    if name in WALKING or name == "frlora" or changes.get("init") in STARTS:
        with pytest.raises(ConfigError, match=r"a part of the weights|along random directions"):
            run(world, method, still, rounds=1, **bits)
        return
    treatments = [None]
    if name in {"fedavg_lora", "fed_rac_lora"}:
        treatments.append({"server_optimizer": Momentum()})
    for treatment in treatments:
        done = run(world, method, still, rounds=4, cohort=3, treatment=treatment, **bits)
        assert_close_trees(done.weights, world.base, 1e-6)
        first, last = done.strategy.recorder.ledger.rows[0], done.rows[-1]
        assert first["metrics"]["loss"] == pytest.approx(world.loss(world.base), rel=1e-12)
        assert last["metrics"]["loss"] == pytest.approx(first["metrics"]["loss"], rel=1e-6)
