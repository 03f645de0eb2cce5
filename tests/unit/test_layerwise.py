"""What a method that speaks of one layer is told of it, and how its messages are counted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.link import Term
from fedraclora.protocol.method import Cohort, Draw, Plan, Traits
from fedraclora.strategies.shared.layer import RoundReplies, float64, multiplied
from fedraclora.strategies.shared.layerwise import (
    Factors,
    Layer,
    LayerMethod,
    LayerUpdate,
    Replies,
    RoundContext,
)
from tests.contract.worlds import distance, make_world, mean_weights, play_rounds

DRAW = Draw(1)


class ByTurns(LayerMethod):
    """Trains B in every other link, and A in the others."""

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
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
    sent = method.open_round(
        method.initial_state({"w": torch.zeros(m, n)}, plan, draw), 1, cohort, draw
    )
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
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        A = now.sketch(layer, "A", "gaussian", index=layer.link, normalize="rows")
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

    label: str = "A"

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        found = super().factors(layer, now)
        return {("V" if k == self.label == "A" else k): f for k, f in found.items()}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return replace(super().update(layer, replies), carried={self.label: replies.mean("B")})


@pytest.mark.parametrize(
    ("label", "told"), [("A", "V"), ("S", "S")], ids=["of a frozen factor", "of what is carried"]
)
def test_a_label_of_no_factor_is_refused(label: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"the factor '{told}', expected B, R, A"):
        play_rounds(Mislabelled(rank=3, label=label), make_world(), 1, DRAW)
    layer = Layer("w", (5, 9), 2, 1.0, {}, link=0, ends=True, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"the factor 'V', .*Use B, R, A"):
        layer.trained("V")
    with pytest.raises(ConfigError, match=r"the factor 'R', .*Use B, A"):
        RoundContext(1, DRAW).sketch(layer, "R", "gaussian")


def test_a_method_that_makes_nothing_of_a_round_is_told_so() -> None:
    class Unfinished(ByTurns):
        update = LayerMethod.update

    with pytest.raises(ConfigError, match=r"Unfinished .*method update"):
        play_rounds(Unfinished(rank=3), make_world(), 1, DRAW)


def test_a_frozen_factor_has_no_mean() -> None:
    @dataclass(frozen=True)
    class Means(Part):
        @override
        def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
            return LayerUpdate(merged=(replies.mean("B"), replies.mean("A")))

    with pytest.raises(ConfigError, match=r"A was frozen.*replies\['A'\]"):
        play_rounds(Means(rank=3), make_world(), 1, DRAW)


@dataclass(frozen=True)
class Cored(LayerMethod):
    """Factors B R A of which some are frozen, with half of the means' product merged."""

    frozen: str = "R"

    traits = Traits(exact=False, linear=False, merges=True)

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        r, eye = layer.rank, torch.eye(layer.rank)
        starts = {k: now.sketch(layer, k, "gaussian", index=layer.link) for k in "BA"}
        found: Factors = {k: layer.trained(k, s) for k, s in starts.items()} | {
            "R": layer.trained("R", eye + 0.1 * torch.ones(r, r))
        }
        still = starts[self.frozen] if self.frozen in starts else 2 * eye
        return found | {self.frozen: still}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        left, right = multiplied(replies.means().values())
        return LayerUpdate(merged=(0.5 * left, right))


@pytest.mark.parametrize("frozen", ["R", "A", "B"])
def test_a_mean_of_products_has_the_factors_that_are_frozen(frozen: str) -> None:
    world, method = make_world(), Cored(rank=3, alpha=5.0, frozen=frozen)
    for played in play_rounds(method, world, 2, DRAW):
        came = RoundReplies(played.before, played.sent, played.uplinks)
        p = played.uplinks.weights / played.uplinks.weights.sum()
        for name, adapter in played.sent.adapters.items():
            replies = Replies(came, name)
            wanted = sum(
                p[k] * torch.linalg.multi_dot([own_factor(replies, label, k) for label in "BRA"])
                for k in range(len(p))
            )
            left, right = replies.product()
            torch.testing.assert_close(left @ right, wanted, rtol=1e-12, atol=1e-12)
            assert [*adapter.factors] == ["B", "R", "A"]


def own_factor(replies: Replies, label: str, client: int) -> torch.Tensor:
    """A factor of one client, whether it was trained or not."""
    factor = replies.adapter.factors[label]
    if factor.trained:
        return replies.stack(label)[client]
    return float64(replies[label], torch.empty(0))


@dataclass(frozen=True)
class Beside(LayerMethod):
    """Fed-RAC-LoRA whose A has rows orthogonal to those of the last link."""

    traits = Traits(exact=True, linear=True, merges=True)
    keeps = ("A",)
    draws = "A"
    parts = 2  # the rows of two links share the dimension

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        A = now.sketch(layer, "A", "orthonormal", index=layer.link).draw()
        if (last := layer.carried.get("A")) is not None:
            A = torch.linalg.qr(torch.cat([last, A]).mT)[0].mT[layer.rank :]
        return {"B": layer.trained("B"), "A": A}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        A = replies["A"]
        return LayerUpdate(carried={"A": A}, merged=(replies.mean("B"), A))


@dataclass(frozen=True)
class BesideDrawn(Beside):
    """The same, whose first A is sent as a seed."""

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        first = {} if layer.carried else {"A": now.sketch(layer, "A", "orthonormal")}
        return super().factors(layer, now) | first


@pytest.mark.parametrize("kind", [Beside, BesideDrawn])
def test_a_frozen_factor_may_be_made_from_that_of_the_last_link(kind: type[Beside]) -> None:
    world, method = make_world(), kind(rank=3, alpha=5.0)
    rounds = play_rounds(method, world, 3, DRAW)
    for number, played in enumerate(rounds, start=1):
        sent = sum(f.floats for f in played.sent.named.values())
        assert method.floats(world.plan, number) == (played.sent.layout.size, sent)
        torch.testing.assert_close(method.weights(played.after, DRAW), mean_weights(played))
    for last, now in pairwise(rounds):
        for name, adapter in now.sent.adapters.items():
            A, before = (a.factors["A"].draw() for a in (adapter, last.sent.adapters[name]))
            assert len(A) == method.rank_of(world.plan, name)
            assert float((A @ before.mT).abs().max()) < 1e-9


def test_factors_that_share_a_side_bound_the_rank_by_their_own_name() -> None:
    (m, n), name = (5, 9), "w"
    plan = Plan({name: LayerView("linear", (m, n))}, shapes={name: (m, n)})
    found = Beside(rank=8).layer_rank(plan, name)
    assert (found.value, Beside(rank=4).rank_of(plan, name)) == (4, 4)  # 2 r <= n
    assert found.note
    assert "2 factors" in found.note
    assert "sketches" not in found.note  # it has no such key
    with pytest.raises(ConfigError, match=r"rank=8.*shared by 2 factors"):
        Beside(rank=8, cap=False).rank_of(plan, name)


def test_a_drawing_that_is_carried_and_not_kept_is_refused() -> None:
    """Else it is dropped, and the method that reads it from what is carried is another one."""

    @dataclass(frozen=True)
    class Unsaid(BesideDrawn):
        keeps = ()

    with pytest.raises(ConfigError, match=r'A is a random factor.*keeps = \("A",\) in Unsaid'):
        play_rounds(Unsaid(rank=3), make_world(), 1, DRAW)


def test_that_clients_keep_a_factor_must_be_said() -> None:
    """Else their state is not stored, and the server measures weights that nobody has."""

    @dataclass(frozen=True)
    class Secretive(Part):
        @override
        def factors(self, layer: Layer, now: RoundContext) -> Factors:
            return {"B": layer.trained("B", upload=False), "A": layer.trained("A")}

    with pytest.raises(ConfigError, match=r"Secretive .*factor B .*client_state = True"):
        play_rounds(Secretive(rank=3), make_world(), 1, DRAW)


def test_what_a_factor_that_crosses_links_leaves_must_be_said() -> None:
    @dataclass(frozen=True)
    class Crosses(Part):
        carries = True

        @override
        def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
            return LayerUpdate(carried={"B": self.part * replies.mean("B")})

    with pytest.raises(ConfigError, match=r"after its merge.*LayerUpdate\(aggregate="):
        play_rounds(Crosses(rank=3), make_world(), 1, DRAW)


@dataclass(frozen=True)
class Keeping(Part):
    """Keeps a factor of what it merges for the next link."""

    keep: str = "B"
    wide: bool = False
    part: float = 1.0

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        B, A = replies.mean("B"), replies["A"]
        if self.wide:
            return LayerUpdate(merged=(B, torch.eye(layer.rank), A.draw()), keep=self.keep)
        merged = (B, A) if layer.ends else None
        return LayerUpdate({} if merged else {"B": B}, merged, keep=self.keep)


def test_the_factor_that_is_kept_is_what_the_next_link_sees() -> None:
    world = make_world()
    for keep, wide in (("B", False), ("B", True), ("A", True)):
        method = Keeping(rank=3, alpha=5.0, keep=keep, wide=wide)
        first, second = play_rounds(method, world, 2, DRAW)
        assert first.after.link is not None
        for layer in method.layers_of(second.before):
            B, *_, A = first.after.link.terms[layer.name].factors
            assert layer.past is not None
            assert torch.equal(layer.past, (B if keep == "B" else A).draw())


@pytest.mark.parametrize(("changes", "what"), [({}, "no matrix"), ({"rounds": 2}, "not a fac")])
def test_to_keep_what_replicas_would_not_have_is_refused(changes: Any, what: str) -> None:
    """Else `Layer.past` is None for ever, and another method runs."""
    with pytest.raises(ConfigError, match=rf"keep='A'\) of fc1.weight: .* is {what}"):
        play_rounds(Keeping(rank=3, alpha=5.0, keep="A", **changes), make_world(), 1, DRAW)
    spec = RoundContext(1, DRAW).sketch(layer_of(), "A", "gaussian")
    with pytest.raises(ConfigError, match="is no matrix"):
        Term.of((torch.zeros(5, 3), spec), 1.0, keep=1)


def layer_of() -> Layer:
    return Layer("w", (5, 9), 3, 1.0, {}, link=0, ends=True, dtype=torch.float32)
