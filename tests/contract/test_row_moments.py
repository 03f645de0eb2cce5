"""Rounds under ``local.optimizer_state=rows``: bytes, means, resuming, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typing_extensions import override
from worlds import (
    Played,
    Run,
    array_bytes,
    assert_equal_trees,
    distance,
    label,
    make_method,
    make_world,
    mean_weights,
    run,
    stepped,
)

from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.devices.distributions import Choice
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secagg import SecAgg
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.optimizer import ROW_SLOT
from tests.messages import unpack_downlink

ADAMW = LocalSettings(optimizer="adamw", lr=0.02, epochs=2, batch_size=4, beta2=0.9)
ROWWISE = LocalSettings(
    optimizer="adamw", lr=0.02, epochs=2, batch_size=4, beta2=0.9, optimizer_state="rows"
)
COHORT, ROUNDS = 3, 4
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("fed_rac_lora", {}),
    ("fed_rac_lora", {"train": "A", "merge_every": 3}),
    ("ffa_lora", {}),
    ("fedavg_lora", {}),
    ("rolora", {}),
    ("subspace_rac_lora", {}),
    ("pool_rac_lora", {"refresh": 2}),
]
SHORT = ("fed_rac_lora", "subspace_rac_lora")
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=label)
some_are_slow = pytest.mark.short(when=lambda variant: variant[0] in SHORT)


class Watched(RoundStep):
    """Keeps all rounds as the method closed them."""

    individuals = True

    @override
    def begin(self, state: State) -> None:
        self.played: list[Played] = []

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        after = close(uplinks)
        self.played.append(Played(state, exchange.downlink, uplinks, after))
        return after


def finished(variant: tuple[str, dict[str, Any]], **more: Any) -> Run:
    local = more.pop("local", ROWWISE)
    more = {"rounds": ROUNDS, "cohort": COHORT, "chunk": COHORT} | more
    return run(make_world(), make_method(variant[0], **variant[1]), local, **more)


@some_are_slow
@every_variant
def test_a_row_costs_a_number_and_moments_are_their_mean(variant: Any) -> None:
    watched = Watched()
    done = finished(variant, chunk=1, steps=[watched])
    plain = finished(variant, chunk=1, steps=[Watched()], local=ADAMW)
    method, draw = done.strategy.method, done.strategy.draw
    answered = sum(map(array_bytes, done.worker.answered))
    assert sum(row["uplink_bytes"] for row in done.rows) == answered
    for played, row, beside in zip(watched.played, done.rows, plain.rows, strict=True):
        slots = {n: s for n, s in played.sent.dense.items() if n.startswith(ROW_SLOT)}
        trained = {n: f for n, f in played.sent.factors().items() if f.trained}
        assert {n: s.shape for n, s in slots.items()} == {
            ROW_SLOT + n: (f.shape[n.endswith("/A")] + 1,) for n, f in trained.items()
        }
        more = [s.shape[0] * 8 * COHORT for s in slots.values()]  # numbers of float64
        assert row["uplink_bytes"] == beside["uplink_bytes"] + sum(more)
        known = sum(
            size for size, s in zip(more, slots.values(), strict=True) if s.numbers is not None
        )
        assert row["downlink_bytes"] == beside["downlink_bytes"] + known
        if method.traits.exact:
            wanted = stepped(method, played, mean_weights(played), draw)
            old = method.weights(played.before, draw)
            off = distance(method.weights(played.after, draw), wanted, list(old))
            assert off <= 1e-12 * distance(old, wanted, list(old))
    found = done.strategy.state.moments
    assert found
    for name, kept in found.items():
        last = next(p for p in watched.played[::-1] if name in p.sent.dense)
        shares = last.uplinks.weights / last.uplinks.weights.sum()
        torch.testing.assert_close(kept, shares @ last.uplinks.stack()[name].double())


@some_are_slow
@every_variant
def test_a_run_of_sums_has_the_bits(variant: Any) -> None:
    assert_equal_trees(finished(variant, steps=[Watched()]).weights, finished(variant).weights)


def test_moments_go_on_across_sketches_and_move_the_second_round() -> None:
    """The first round is that of AdamW; the second begins where the first has ended."""
    first, plain = (finished(VARIANTS[0], rounds=1, local=local) for local in (ROWWISE, ADAMW))
    assert_equal_trees(first.weights, plain.weights)
    rows, plain = (finished(VARIANTS[0], rounds=2, local=local) for local in (ROWWISE, ADAMW))
    assert any(not torch.equal(t, plain.weights[n]) for n, t in rows.weights.items())
    second = [unpack_downlink(content)[0] for content in rows.worker.asked][-1]
    assert all(s.numbers is not None for n, s in second.dense.items() if n.startswith(ROW_SLOT))


@pytest.mark.parametrize(
    ("name", "more", "beside"),
    [
        ("fed_rac_lora", {"treatment": {"secure": SecAgg(clip=1.0)}}, "secure=secagg"),
        (
            "fed_rac_lora",
            {"treatment": {"privacy": ClientLevel(clip=0.1)}, "weights": "uniform"},
            "privacy=client_level",
        ),
        ("fed_rac_lora", {"uplink": "int8"}, "compression.uplink below float32"),
        ("fed_rac_lora", {"downlink": "bfloat16"}, "compression.downlink below float32"),
        (
            "fed_rac_lora",
            {"treatment": {"server_optimizer": Momentum(space="factors")}},
            "server_optimizer.space=factors",
        ),
        (
            "fed_rac_lora",
            {"system": SystemConfig(rank_budget=Choice([0.34, 1.0]))},
            "train different parameters",
        ),
        ("fedavg", {}, "a trained factor A or B"),
        ("fed_sb", {}, "a trained factor A or B"),
    ],
)
def test_what_it_does_not_go_with_is_refused_by_name(
    name: str, more: dict[str, Any], beside: str
) -> None:
    with pytest.raises(ConfigError, match=f"local.optimizer_state=rows .*{beside}"):
        finished((name, {}), rounds=1, **more)
