"""What a method that speaks of one layer is told of it, and how its messages are counted."""

from __future__ import annotations

import torch
from typing_extensions import override

from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Plan, Traits
from strategies.shared.layerwise import Factors, Layer, LayerMethod, LayerUpdate, Replies, Round


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
