"""What `FedSb` says of itself, against dense algebra."""

from __future__ import annotations

from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Plan
from fedraclora.strategies.methods.fed_sb import FedSb
from tests.methods.one_matrix import ALPHA, COHORT, DRAW, M, R, W, check_cores


def test_the_core_stands_between_orthonormal_factors() -> None:
    check_cores(FedSb(R, ALPHA))


def test_the_two_factors_about_a_core_are_independent() -> None:
    """A square weight has equal shapes on both sides: they must not be one drawing."""
    plan = Plan({"w": LayerView("linear", (M, M))}, shapes={"w": (M, M)})
    method = FedSb(R, ALPHA)
    sent = method.open_round(method.initial_state({"w": W[:, :M]}, plan, DRAW), 1, COHORT, DRAW)
    B, A = (sent.adapters["w"].factors[label].draw() for label in ("B", "A"))
    assert float((B - A.mT).abs().max()) > 0.1
