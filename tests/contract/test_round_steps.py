"""The list of steps: one of a user's own, and the order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, starts
from fedraclora.aggregation.robust import Median
from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.attacks import ALittleIsEnough, SignFlip
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.privacy.secagg import SecAgg
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import Row
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.strategies.steps import round_steps
from fedraclora.training.extras.settings import LocalSettings
from tests.contract.worlds import World, assert_close_trees, make_method, make_world, run

LOCAL = LocalSettings(lr=0.1, steps=2, batch_size=0)


class KeepLargest(RoundStep):
    """Hands on the larger half of the numbers of the mean update, and what it left out later.

    Attributes:
        left: What was left out so far, float64 [P].
    """

    left: torch.Tensor

    @override
    def begin(self, state: State) -> None:
        self.left = torch.zeros(())

    @override
    def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
        start = starts(context, uplinks)
        update = uplinks.sum() / uplinks.total - start + self.left
        cut = update.abs() >= update.abs().median()
        self.left = torch.where(cut, 0.0, update)
        kept = torch.where(cut, update, 0.0)
        return replace(uplinks, stacked=None, summed=start + kept, denominator=1.0)

    @override
    def columns(self, exchange: Exchange, uplinks: Uplinks | None) -> Row:
        return {"left_out": None if uplinks is None else float(self.left.norm())}


def test_a_step_of_ones_own_needs_one_class(world: World) -> None:
    """Compression at the server, with what it leaves out carried over (error feedback)."""
    method = make_method("fedavg")
    more: dict[str, Any] = {"rounds": 3, "weights": "uniform"}
    found = run(world, method, LOCAL, steps=(KeepLargest(),), **more)
    plain = run(world, method, LOCAL, **more)
    before, after = world.base["fc1.weight"], found.weights["fc1.weight"]
    assert float((after - plain.weights["fc1.weight"]).abs().max()) > 1e-6
    assert [row["left_out"] > 0 for row in found.rows] == [True] * 3
    one = run(world, method, LOCAL, rounds=1, weights="uniform", steps=(KeepLargest(),))
    still = one.weights["fc1.weight"] == before
    assert 0 < int(still.sum()) < still.numel()
    assert int((after == before).sum()) < int(still.sum()), "nothing was carried over"


def test_the_first_step_closes_around_those_behind_it(world: World) -> None:
    seen: list[str] = []

    class Around(RoundStep):
        def __init__(self, name: str) -> None:
            self.name = name

        @override
        def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
            seen.append(f"treat {self.name}")
            return uplinks

        @override
        def close(
            self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks
        ) -> State:
            seen.append(f"before {self.name}")
            after = close(uplinks)
            seen.append(f"after {self.name}")
            return after

    method = make_method("fed_rac_lora")
    found = run(world, method, LOCAL, rounds=1, steps=(Around("a"), Around("b")))
    assert seen == ["treat a", "treat b", "before a", "before b", "after b", "after a"]
    assert_close_trees(found.weights, run(world, method, LOCAL, rounds=1).weights, 0)


def test_steps_stand_in_the_order_in_which_updates_pass_them() -> None:
    chosen = {
        "aggregator": Median(),
        "attack": ALittleIsEnough(0.2),
        "privacy": ClientLevel(),
        "secure": SecAgg(),
        "server_optimizer": Momentum(),
        "control_variates": True,
    }
    everything = round_steps({**chosen, "local": replace(LOCAL, dp=SampleNoise())})
    assert [type(step).__name__ for step in everything] == [
        "CompatibilityCheck",
        "WithoutGradientFigures",
        "Attackers",
        "RobustRule",
        "PrivateRounds",
        "SecureSum",
        "SampleAccount",
        "ControlVariates",
        "OptimisedServer",
    ]
    assert [type(step).__name__ for step in round_steps({"local": LOCAL})] == ["CompatibilityCheck"]
    some = round_steps({"attack": SignFlip(0.2), "local": LOCAL})
    assert [type(step).__name__ for step in some] == ["CompatibilityCheck", "Attackers"]


@pytest.mark.parametrize(
    ("local", "told"),
    [
        (LOCAL, True),
        (replace(LOCAL, optimizer="adamw"), False),
        (replace(LOCAL, precondition=True), False),
        (replace(LOCAL, clip=1.0), True),
        (replace(LOCAL, clip=1.0, clip_by="layer"), False),
    ],
)
def test_the_energy_seen_is_told_where_steps_follow_the_gradient(
    local: LocalSettings, told: bool
) -> None:
    done = run(make_world(), make_method("subspace_rac_lora"), local, rounds=2, cohort=3)
    assert ("energy_seen" in done.rows[-1]["report"]) == told
