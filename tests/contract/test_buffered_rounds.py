"""FedBuff over methods: every step of the server against dense algebra, and going on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override
from worlds import (
    RAGGED,
    Played,
    Run,
    World,
    assert_close_trees,
    assert_equal_trees,
    assert_updates_lead_on,
    client_weights,
    label,
    make_method,
    make_world,
    run,
)

from fedraclora.aggregation.robust import Median
from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.devices.asynchronous import AsyncStep
from fedraclora.devices.distributions import LogNormal
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Draw, RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.rebuild import state_at
from fedraclora.strategies.buffered import BufferedStrategy, read_batches
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Layout, Tree
from fedraclora.weights.chain import CatchUp, link_tensors, read_link, term_bytes
from tests.common import accepted

Variant = tuple[str, dict[str, Any]]
SEED, COHORT = 1, 4
UNEVEN = SystemConfig(speed=LogNormal(1.0, 1.2), jitter=0.4, buffer=2)
EXACT: list[Variant] = [
    ("fed_rac_lora", {}),
    ("fed_rac_lora", {"train": "A", "sketch": "gaussian", "server_lr": 0.5}),
    ("ffa_lora", {}),
    ("bernoulli_lora", {}),
    ("fedavg", {}),
]


class Watched(BufferedStrategy):
    """Keeps what each round began from, asked, and how it passed on the clock."""

    seen: list[tuple[State, RoundInstructions, AsyncStep]]

    @override
    def _close(self, exchange: Exchange, after: State) -> None:
        leg, before = self._leg, self.state
        assert leg is not None
        self.seen = [*getattr(self, "seen", []), (before, exchange.downlink, leg)]
        super()._close(exchange, after)


def go(world: World, variant: Variant, rounds: int, **more: Any) -> Run:
    system = more.pop("system", UNEVEN)
    local = more.pop("local", RAGGED)
    method = make_method(variant[0], **variant[1])
    return run(
        world, method, local, rounds=rounds, cohort=COHORT, seed=SEED, system=system, kind=Watched,
        **more,
    )  # fmt: skip


def trained(
    world: World, seen: tuple[State, RoundInstructions, AsyncStep], client: int, round_: int
) -> Played:
    """One client trained again, from what its round began with."""
    before, sent, _ = seen
    trainer = CohortTrainer(world.task, world.plan, RAGGED, seed=SEED, device=torch.device("cpu"))
    one = torch.tensor([client])
    result = trainer.train(before.base, sent, one, round_=round_, rate_scale=1.0)
    layout = Layout.of(result.trained, skip=1)
    got = Uplinks(one, result.samples.double(), layout, layout.pack(result.trained, lead=1))
    return Played(before, sent, got, before)


@pytest.mark.parametrize("variant", EXACT, ids=label)
def test_every_step_is_the_discounted_mean_of_what_came(variant: Variant) -> None:
    """Each reply counts as the change of dense weights since its client started."""
    world = make_world()
    done = go(world, variant, 6)
    strategy = done.strategy
    assert isinstance(strategy, Watched)
    method, draw = strategy.method, Draw(SEED)
    states = [s for s, _, _ in strategy.seen] + [strategy.state]
    ages: Counter[int] = Counter()
    for t, (before, _, leg) in enumerate(strategy.seen, start=1):
        assert len(leg.landed) == 2
        total, moved = 0.0, {n: torch.zeros_like(w) for n, w in before.base.items()}
        for flight in leg.landed:
            played = trained(world, strategy.seen[flight.round_ - 1], flight.client, flight.round_)
            weight, age = float(played.uplinks.weights[0]), t - flight.round_
            old = method.weights(played.before, draw)
            for n, new in client_weights_of(method, played, draw).items():
                moved[n] += weight / (1 + age) ** 0.5 * (new - old[n])
            total += weight
            ages[age] += 1
        step = method.traits.step
        wanted = {n: w + step * moved[n] / total for n, w in method.weights(before, draw).items()}
        assert_close_trees(method.weights(states[t], draw), wanted, tolerance=1e-9)
        report = done.rows[t - 1]["report"]
        found = [t - f.round_ for f in leg.landed]
        assert report["staleness"] == sum(found) / 2
        assert report["staleness_max"] == max(found)
    assert len(ages) > 2, "no reply was stale: the test shows nothing"


def client_weights_of(method: Any, played: Played, draw: Draw) -> Tree:
    """Dense weights that a client ended with; what is adapted counts from the base."""
    del method, draw
    return client_weights(played, 0)


def test_the_clock_is_that_of_the_replies_and_places_are_always_taken() -> None:
    done = go(make_world(sizes=(3,) * 12), ("fed_rac_lora", {}), 8)
    strategy = done.strategy
    assert isinstance(strategy, Watched)
    now, flying = 0.0, 0
    for (_, _, leg), row in zip(strategy.seen, done.rows, strict=True):
        assert leg.end == max(f.lands for f in leg.landed)
        assert leg.end >= now
        assert row["virtual_seconds"] == leg.end
        assert row["asked"] == len(leg.started)
        flying += len(leg.started) - len(leg.landed)
        assert flying == len(leg.flying) == COHORT - 1  # the last that came is replaced later
        assert all(f.lands >= leg.end for f in leg.flying)
        now = leg.end


def test_a_reply_is_merged_once_and_waits_until_then() -> None:
    done = go(make_world(), ("ffa_lora", {}), 8)
    strategy = done.strategy
    assert isinstance(strategy, Watched)
    legs = [leg for _, _, leg in strategy.seen]
    started = [f for leg in legs for f in leg.started]
    merged = [f for leg in legs for f in leg.landed]
    waiting = [f for batch in read_batches(strategy.state).batches for f in batch.flights]
    assert sorted(merged + waiting) == sorted(started)
    assert len(set(started)) == len(started) > len(merged) > 0


def test_links_are_one_for_each_sketch_and_rebuild_the_base(tmp_path: Path) -> None:
    world = make_world()
    done = go(world, ("fed_rac_lora", {}), 6, folder=tmp_path)
    strategy = done.strategy
    assert isinstance(strategy, Watched)
    assert_equal_trees(state_at(tmp_path, 6).base, strategy.state.base)
    states = [s for s, _, _ in strategy.seen[1:]] + [strategy.state]
    sketches: set[Any] = set()
    for state, (_, _, leg) in zip(states, strategy.seen, strict=True):
        assert state.link is not None
        parts = state.link.parts()
        assert len(parts) == len({f.round_ for f in leg.landed})
        sketches |= {p.terms["fc1.weight"].factors[1].drawing for p in parts}
        catch_up = CatchUp(world.base, 1)
        catch_up.add(state.link)
        size = sum(term_bytes(t) for p in parts for t in p.terms.values())
        size += sum(t.numel() * 8 for p in parts for t in p.dense.values())
        assert int(catch_up.sums[-1].sum()) == size
        again = read_link(*link_tensors(state.link))
        assert len(again.parts()) == len(parts)
    assert_updates_lead_on(tmp_path)
    assert max(len(s.link.parts()) for s in states if s.link) == 2
    assert len(sketches) > 3


SCALED: dict[str, Any] = {"uplink": "int4", "downlink": "int8"}
ROTATED: dict[str, Any] = {"uplink": "eden3", "downlink": "eden3"}
BOTH = {"uplink_coding": "zstd", "downlink_coding": "zstd"}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fed_rac_lora", SCALED),
        ("ffa_lora", SCALED | {"feedback": True}),
        pytest.param("fed_rac_lora", ROTATED | BOTH, marks=pytest.mark.long),
    ],
)
def test_in_fewer_bits_replies_may_come_in_any_order(
    name: str, bits: dict[str, Any], tmp_path: Path
) -> None:
    world = make_world(dtype=torch.float32, width=8 if "uplink_coding" in bits else 1)
    whole = go(world, (name, {}), 5, folder=tmp_path, **bits)
    turned = go(world, (name, {}), 5, arrange=lambda messages: messages[::-1], **bits)
    assert_equal_trees(turned.strategy.state.base, whole.strategy.state.base)
    assert_equal_trees(turned.strategy.state.carried, whole.strategy.state.carried)
    assert all(row["rounding_up"] > 0 for row in whole.rows)
    assert_updates_lead_on(tmp_path, bits.get("downlink_coding", "none"))


@pytest.mark.short(when=lambda kinds: kinds is SCALED)
@pytest.mark.parametrize("kinds", [SCALED, ROTATED], ids=["scaled", "rotated"])
def test_coding_moves_neither_weights_nor_the_clock(kinds: dict[str, Any]) -> None:
    """Who is late must not depend on the version of a coder: time is that of bytes without."""
    world = make_world(dtype=torch.float32, width=64 if kinds is SCALED else 8)
    slow = replace(UNEVEN, downlink=LogNormal(2000.0, 0.3), uplink=LogNormal(2000.0, 0.3))
    more = {"system": slow, **kinds}
    plain, coded = (go(world, ("fed_rac_lora", {}), 5, **more, **way) for way in ({}, BOTH))
    assert_equal_trees(coded.strategy.state.base, plain.strategy.state.base)
    clocks = [[row["virtual_seconds"] for row in each.rows] for each in (coded, plain)]
    assert clocks[0] == clocks[1]
    for way in ("uplink_total", "downlink_total"):
        few, many = coded.rows[-1][way], plain.rows[-1][way]
        assert few < many if kinds is SCALED else few <= many


@pytest.mark.parametrize("rule", [Momentum(beta=0.5), None], ids=["momentum", "none"])
@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg_lora"])
def test_replies_on_their_way_may_come_in_any_order(name: str, rule: Momentum | None) -> None:
    world = make_world(dtype=torch.float32)
    rough = replace(UNEVEN, drop_out=0.3)

    def play(**more: Any) -> Run:
        beside = {} if rule is None else {"treatment": {"server_optimizer": rule}}
        return go(world, (name, {}), 5, system=rough, **beside, **more)

    whole = play()
    turned = play(arrange=lambda messages: messages[::-1])
    assert_equal_trees(turned.strategy.state.base, whole.strategy.state.base)
    assert_equal_trees(turned.strategy.state.moments, whole.strategy.state.moments)
    assert turned.strategy.recorder.ledger.digest() == whole.strategy.recorder.ledger.digest()
    assert any(n.startswith("buffer/") for n in whole.strategy.state.moments)
    assert sum(len(row["dropped"]) for row in whole.rows) > 0


@pytest.mark.parametrize(
    ("variant", "more", "told"),
    [
        (("flora_stacking", {}), {}, "each client's update"),
        (("fedsa_lora", {}), {}, "part of the model at each client"),
        (("fed_rac_lora", {"sketches": 2}), {}, "train different parameters"),
        (("fed_rac_lora", {"merge_every": 2}), {}, "merges after several rounds"),
        (("rolora", {}), {}, "factors of the last merge"),
        (("fedsvd", {}), {}, "factors of the last merge"),
        (("slora", {"sparse_rounds": 2}), {}, "needs more than the weights"),
        (("subspace_rac_lora", {"merge_every": 1}), {}, "factors of the last merge"),
        (("subspace_rac_lora", {}), {}, "merges after several rounds"),
        (
            ("subspace_rac_lora", {"rank": 1, "fresh": 0.0, "merge_every": 1}),
            {},
            "factors of the last merge",
        ),
        (("pool_rac_lora", {}), {}, "frozen factors recur"),
        (("fed_rac_lora", {"blocks": "cover"}), {}, "method.blocks=cover"),
        (("fed_rac_lora", {}), {"aggregator": Median()}, "aggregator=median"),
        (
            ("fed_rac_lora", {}),
            {"treatment": {"server_optimizer": Momentum(space="factors")}},
            "space=factors",
        ),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_cannot_be_mixed_is_refused(variant: Variant, more: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        go(make_world(), variant, 6, **more)


def test_one_block_of_a_cover_that_serves_for_ever_leaves_none_out() -> None:
    strategy = go(make_world(), ("ffa_lora", {"blocks": "cover"}), 4).strategy
    assert isinstance(strategy, Watched)
    indices = {
        factor.drawing.index
        for _, sent, _ in strategy.seen
        for factor in sent.factors().values()
        if factor.drawing is not None
    }
    assert indices == {0}


def test_a_method_inside_another_is_looked_at() -> None:
    method = Dora(make_method("rolora"))
    with pytest.raises(ConfigError, match="factors of the last merge"):
        run(make_world(), method, RAGGED, rounds=1, cohort=COHORT, seed=SEED, system=UNEVEN)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"speed": None, "jitter": 0.0}, "without a speed or a network"),
        ({"buffer": 0}, "system.buffer=0: expected 1 or more"),
        ({"deadline": 3.0}, "system.deadline=null"),
        ({"over_select": 1.5}, "system.over_select=1"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        accepted("system", replace(UNEVEN, **changes))
