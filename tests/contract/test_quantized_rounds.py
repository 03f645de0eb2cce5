"""Every method with numbers in fewer bits: bytes, replicas, and what is kept is what is sent."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from typing_extensions import override
from worlds import (
    RAGGED,
    Played,
    Run,
    array_bytes,
    assert_equal_trees,
    assert_updates_lead_on,
    distance,
    distinct,
    is_personal,
    make_method,
    make_world,
    mean_weights,
    put_on_the_wire,
    run,
    stepped,
)

from fedraclora.aggregation.base import AggregationContext
from fedraclora.aggregation.robust import Median, shortened
from fedraclora.attacks import ALittleIsEnough
from fedraclora.devices.distributions import Choice
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import SecAgg
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.factor import SEED_BYTES
from fedraclora.protocol.method import Cohort, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.rebuild import state_at
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.strategies.steps import private as private_step
from fedraclora.strategies.steps.robust import RobustRule
from fedraclora.tree import digest
from fedraclora.wire.changes import ChangeCodec
from tests.messages import unpack_downlink

COHORT, ROUNDS = 3, 3
SHORT = {"fed_rac_lora", "fedavg", "fedavg_lora", "fedsa_lora", "fedsvd", "flora_stacking", "slora"}
SHORT |= {"pool_rac_lora"}
BITS: dict[str, Any] = {"uplink": "int8", "downlink": "int4"}
ROTATED: dict[str, Any] = {"uplink": "eden3", "downlink": "eden2", "width": 8}
BOTH = {"uplink_coding": "zstd", "downlink_coding": "zstd"}
CODED: dict[str, Any] = {"uplink": "int4", "downlink": "int8", "width": 8, **BOTH}
KINDS = {"scaled": BITS, "rotated": ROTATED, "coded": CODED}
IN_FULL = {"frlora", "fedkseed", "decomfl", "ferret"}  # their downlink
ALL = sorted({*distinct()} - IN_FULL)
EXACT = [n for n in ALL if make_method(n).traits.exact and not is_personal((n, {}))]


class Individuals(RoundStep):
    """Looks at each client, so that no sums are made where they train."""

    individuals = True


def finished(name: str, **more: Any) -> Run:
    more = {"rounds": ROUNDS, "cohort": COHORT, "width": 1} | more
    return run(make_world(width=more.pop("width")), make_method(name), RAGGED, **more)


def seeds(content: RecordDict) -> int:
    downlink, _ = unpack_downlink(content)
    return sum(f.sketch is not None for f in downlink.named.values())


@pytest.mark.short(
    when=lambda name, kinds: name in (SHORT if kinds == "scaled" else {"fedavg", "pool_rac_lora"})
)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_messages_and_everyone_has_the_servers_bits(
    name: str, kinds: str, tmp_path: Path
) -> None:
    done = finished(name, chunk=1, folder=tmp_path, **KINDS[kinds])
    asked, answered = done.worker.asked, done.worker.answered
    down = sum(array_bytes(c) + SEED_BYTES * seeds(c) for c in asked)
    assert sum(row["downlink_bytes"] for row in done.rows) == down
    assert sum(row["uplink_bytes"] for row in done.rows) == sum(map(array_bytes, answered))
    for row in done.rows:
        assert 0 < row["rounding_up"] < (0.05 if kinds == "scaled" else 0.3)
        assert 0 < row["rounding_down"] < 0.9
    # The chain, late joiners, and what they fetch.
    assert_updates_lead_on(tmp_path, done.strategy.loop.downlink_coding)
    strategy = done.strategy
    assert_equal_trees(state_at(tmp_path, ROUNDS).base, strategy.state.base)
    some = Cohort(torch.arange(2), torch.ones(2))
    sent = strategy.method.open_round(strategy.state, ROUNDS + 1, some, strategy.draw)
    again = strategy.rounding.sent(sent, ROUNDS + 1)
    for key, factor in again.factors().items():
        kept, before = strategy.state.carried.get(key), sent.factors()[key].numbers
        if kept is None or before is None or factor.per_client:
            continue
        if factor.trained or torch.equal(before, kept):  # a method may compute one from another
            assert torch.equal(factor.draw(), kept)


def test_a_pool_that_is_folded_leads_on_in_fewer_bytes(tmp_path: Path) -> None:
    totals = []
    for kind in ("int8", "float32"):
        method, folder = make_method("pool_rac_lora", refresh=2), tmp_path / kind
        done = run(make_world(), method, RAGGED, rounds=5, cohort=2, folder=folder, downlink=kind)
        assert_updates_lead_on(folder)
        totals.append(done.rows[-1]["downlink_total"])  # with catch-up
    assert totals[0] < totals[1] / 2


class Watched(RoundStep):
    """Keeps the last round as the method closed it."""

    individuals = True
    played: Played

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        after = close(uplinks)
        self.played = Played(state, exchange.downlink, uplinks, after)
        return after


@pytest.mark.short(when=lambda name: name in {"fed_rac_lora", "fedavg"})
@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_exact_of_what_was_sent(name: str) -> None:
    """The mean of the clients' weights as they were sent; what goes down adds its own rounding."""
    for downlink, most in (("float32", 1e-12), ("bfloat16", 0.02)):
        watched = Watched()
        done = finished(name, steps=[watched], uplink="int4", downlink=downlink).strategy
        played, method = watched.played, done.method
        old, reached = method.weights(played.before, done.draw), mean_weights(played)
        wanted = stepped(method, played, reached, done.draw)
        off = distance(method.weights(done.state, done.draw), wanted, list(old))
        assert off <= most * distance(old, wanted, list(old))


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg", "fedavg_lora"])
def test_sums_of_clients_are_sums_of_what_they_send(name: str, kinds: str) -> None:
    together = finished(name, chunk=COHORT, **KINDS[kinds])
    rows = finished(name, chunk=COHORT, steps=[Individuals()], **KINDS[kinds])
    assert_equal_trees(together.weights, rows.weights)
    assert [r["rounding_up"] for r in together.rows] == [r["rounding_up"] for r in rows.rows]


BUDGETS = SystemConfig(rank_budget=Choice([0.34, 1.0]))
COLLUDES = ALittleIsEnough(0.67, 2.0)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fedavg", {"chunk": 2, "width": 16}),
        ("pool_rac_lora", {"chunk": 3}),
        ("hetlora", {"chunk": 3, "system": BUDGETS}),
        ("fed_rac_lora", {"chunk": 1, "attack": COLLUDES}),
    ],
)
def test_coding_changes_bytes_and_nothing_else(name: str, more: dict[str, Any]) -> None:
    """Also where sums of clients would do, where a client's rows are cut, and under attack."""
    more = CODED | {"width": 64} | more
    coded, plain = finished(name, **more), finished(name, **more | dict.fromkeys(BOTH, "none"))
    assert_equal_trees(coded.weights, plain.weights)
    for mine, others in zip(coded.rows, plain.rows, strict=True):
        assert 0 < mine["uplink_bytes"] < others["uplink_bytes"]
        assert mine["downlink_total"] <= others["downlink_total"]
        for column in ("train_loss", "rounding_up", "rounding_down", "report"):
            assert mine[column] == others[column]
    if "attack" in more:
        honest = finished(name, **more | {"attack": None})
        assert digest(honest.weights) != digest(coded.weights)
    assert 0 < coded.rows[-1]["downlink_total"] < plain.rows[-1]["downlink_total"]


@pytest.mark.short(when=lambda name, bits: name in {"hetlora", "pool_rac_lora"})
@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *product(["fed_rac_lora", "fedavg", "hetlora"], [BITS, {"downlink": "bfloat16"}, {}]),
        *product(["fed_rac_lora", "hetlora", "pool_rac_lora"], [CODED]),
        *product(["pool_rac_lora", "subspace_rac_lora"], [BITS, {"downlink": "bfloat16"}, {}]),
        *product(["fed_rac_lora", "hetlora", "pool_rac_lora"], [ROTATED]),
    ],
)
def test_messages_that_are_written_change_no_bit(
    name: str, bits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = finished(name, **bits)
    put_on_the_wire(monkeypatch)
    written = finished(name, **bits)
    assert_equal_trees(held.weights, written.weights)
    for column in ("train_loss", "uplink_bytes", "downlink_bytes", "rounding_up"):
        assert [r.get(column) for r in held.rows] == [r.get(column) for r in written.rows]


@pytest.mark.parametrize("kinds", KINDS)
def test_budgets_cut_what_is_rounded(kinds: str) -> None:
    system, bits = SystemConfig(rank_budget=Choice([0.34, 1.0])), KINDS[kinds]
    rows = finished("fed_rac_lora", system=system, chunk=1, **bits)
    sent = sum(map(array_bytes, rows.worker.answered))
    assert sent == sum(row["uplink_bytes"] for row in rows.rows)
    assert sent < sum(r["uplink_bytes"] for r in finished("fed_rac_lora", **bits).rows)


class Seen(RoundStep):
    """Keeps what passes its place of a round."""

    individuals = True

    def __init__(self) -> None:
        self.uplinks: list[Uplinks] = []

    @override
    def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
        self.uplinks.append(uplinks)
        return uplinks


@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg"])
def test_a_rule_works_on_what_was_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    encode = ChangeCodec.encode

    def heard(changes: ChangeCodec, *args: Any) -> torch.Tensor:
        sent.append(found := encode(changes, *args))
        return found

    monkeypatch.setattr(ChangeCodec, "encode", heard)
    before, after = Seen(), Seen()
    finished(name, chunk=COHORT, steps=[before, RobustRule(Median()), after], **BITS)
    assert len(sent) == ROUNDS
    for read, came, left in zip(sent, before.uplinks, after.uplinks, strict=True):
        torch.testing.assert_close(came.rows().double(), read, rtol=0, atol=1e-7)
        mean = left.layout.pack(left.mean()).double()
        torch.testing.assert_close(mean, read.median(dim=0).values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("up", ["int8", "int4", "eden2"])
def test_what_rounding_lengthened_is_shortened_again_before_noise(
    up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, came, used = 0.02, list[torch.Tensor](), list[torch.Tensor]()

    def heard(rows: torch.Tensor, start: torch.Tensor, bound: float) -> torch.Tensor:
        found = shortened(rows, start, bound)
        came.append(torch.linalg.vector_norm(rows - start, dim=1))
        used.append(torch.linalg.vector_norm(found - start, dim=1))
        return found

    monkeypatch.setattr(private_step, "shortened", heard)
    level = ClientLevel(clip=clip, noise_multiplier=0.5, delta=1e-3)
    private = {"privacy": level, "secret": Secret(bytes(range(32)))}
    done = finished("fed_rac_lora", treatment=private, weights="uniform", uplink=up, width=8)
    assert {row.get("rounding_up") for row in done.rows} == {None}
    assert float(torch.cat(came).max()) > clip * (1 + 1e-6)
    assert float(torch.cat(used).max()) <= clip * (1 + 1e-12)


@pytest.mark.long
def test_noise_is_rounded_and_its_rounding_not_told() -> None:
    level = ClientLevel(clip=0.05, noise_multiplier=0.5, delta=1e-3)
    private = {"privacy": level, "secret": Secret(bytes(range(32)))}
    done = finished("fed_rac_lora", rounds=1, treatment=private, weights="uniform", **BITS)
    assert {row.get("rounding_up") for row in done.rows} == {None}
    assert all(row["rounding_down"] > 0 for row in done.rows)


def test_noise_is_not_put_on_updates_of_which_rounding_costs_a_fifth() -> None:
    level = ClientLevel(clip=0.05, noise_multiplier=0.5, delta=1e-3)
    private = {"privacy": level, "secret": Secret(bytes(range(32)))}
    with pytest.raises(
        ConfigError, match=r"compression\.uplink=eden1.*ake compression\.uplink=eden2"
    ):
        finished("fed_rac_lora", rounds=1, treatment=private, weights="uniform", uplink="eden1")


def test_a_secure_sum_has_steps_of_its_own() -> None:
    secure = {"secure": SecAgg(clip=1.0, max_weight=9)}
    for bits in (BITS, ROTATED):
        with pytest.raises(ConfigError, match=r"secure=secagg .* compression\.uplink"):
            finished("fed_rac_lora", treatment=secure, cohort=5, **bits)
    done = finished("fed_rac_lora", treatment=secure, cohort=5, downlink="int8")
    assert done.rows[-1]["rounding_down"] > 0
