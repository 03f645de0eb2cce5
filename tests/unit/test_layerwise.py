"""What a method that speaks of one layer is told of it, and how its messages are counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Plan, Traits
from strategies.shared.layerwise import Factors, Layer, LayerMethod, LayerUpdate, Replies, Round
from tests.contract.worlds import distance, make_world, mean_weights, play_rounds

DRAW = Draw(1)


class ByTurns(LayerMethod):
    """Trains B in every other link, and A in the others."""

    @override
    def factors(self, layer: Layer, now: Round) -> Factors:
        drawn, trained = ("B", "A") if layer.link % 2 else ("A", "B")
        return {drawn: now.sketch(layer, drawn, "gaussian"), trained: layer.trained(trained)}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(merged=tuple(replies.means().values()))

    @property
    @override
    def link_rounds(self) -> int:
        return 2

    @property
    @override
    def traits(self) -> Traits:
        return Traits(exact=True, linear=True, merges=True, varies=True)


def test_numbers_are_counted_in_the_link_of_their_round() -> None:
    m, n, r = 5, 9, 2
    plan = Plan({"w": LayerView("linear", (m, n))}, shapes={"w": (m, n)})
    method, draw = ByTurns(rank=r, alpha=3.0), Draw(1)
    counted = [method.floats(plan, round_) for round_ in range(1, 6)]
    B, A = m * r, r * n
    assert counted == [
        (B, 0),
        (B, B),
        (A, 0),
        (A, A),
        (B, 0),
    ]  # within a link what is trained goes on
    cohort = Cohort(torch.arange(2), torch.ones(2, dtype=torch.float64))
    sent = method.open_round(method.init({"w": torch.zeros(m, n)}, plan, draw), 1, cohort, draw)
    assert [*sent.trained()] == ["w/B"]


@dataclass(frozen=True)
class Part(LayerMethod):
    """Trains B under a drawing, and merges a part of its mean, or carries that on."""

    part: float = 0.5
    rounds: int = 1

    traits = Traits(exact=False, linear=True, merges=True)

    @property
    @override
    def link_rounds(self) -> int:
        return self.rounds

    @override
    def factors(self, layer: Layer, now: Round) -> Factors:
        A = now.sketch(layer, "A", "gaussian", index=layer.link, normalise="rows")
        return {"B": layer.trained("B"), "A": A}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        B = self.part * replies.mean("B")
        if not layer.ends:
            return LayerUpdate(carried={"B": B})
        return LayerUpdate(merged=(B, replies["A"])) if self.part else LayerUpdate()


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("part", [0.5, 0.0])
def test_the_error_of_one_trained_factor_is_measured_under_the_drawing(
    part: float, rounds: int
) -> None:
    world, method = make_world(), Part(rank=3, alpha=5.0, part=part, rounds=rounds)
    targets = list(world.plan.targets)
    for played in play_rounds(method, world, 4, DRAW):
        old, new = (method.weights(state, DRAW) for state in (played.before, played.after))
        wanted = mean_weights(played)
        missed = distance(new, wanted, targets) / distance(wanted, old, targets)
        assert missed > 0.1
        assert played.after.report["aggregation_error"] == pytest.approx(missed, rel=1e-9)


@dataclass(frozen=True)
class Mislabelled(Part):
    """Has a factor V, or carries a sum S."""

    label: str = "V"

    @override
    def factors(self, layer: Layer, now: Round) -> Factors:
        found: Mapping[str, object] = super().factors(layer, now)
        return {("V" if k == self.label == "A" else k): f for k, f in found.items()}  # type: ignore[misc]

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return replace(super().update(layer, replies), carried={self.label: replies.mean("B")})


@pytest.mark.parametrize(
    ("label", "told"),
    [("A", "Mislabelled.factors has 'V'"), ("S", "Mislabelled.update carries 'S'")],
)
def test_a_label_of_no_factor_is_refused(label: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"{told}, the label of no factor: there are B, R, A"):
        play_rounds(Mislabelled(rank=3, label=label), make_world(), 1, DRAW)


def test_a_method_that_makes_nothing_of_a_round_is_told_so() -> None:
    class Unfinished(ByTurns):
        update = LayerMethod.update

    with pytest.raises(ConfigError, match=r"Unfinished has no method update"):
        play_rounds(Unfinished(rank=3), make_world(), 1, DRAW)


def test_a_frozen_factor_has_no_mean() -> None:
    @dataclass(frozen=True)
    class Means(Part):
        @override
        def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
            return LayerUpdate(merged=(replies.mean("B"), replies.mean("A")))

    with pytest.raises(KeyError, match=r"trained and sent \['B'\]; what was frozen is replies"):
        play_rounds(Means(rank=3), make_world(), 1, DRAW)
