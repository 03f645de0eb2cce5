"""The effective step of the ledger is the step that is taken."""

from __future__ import annotations

import pytest
import torch

from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Factor, RoundInstructions
from fedraclora.sketch import SketchSpec
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.localconfig import effective_step


def sketched(scale: float, *, side: str = "right", **changes: object) -> Adapter:
    settings = {"kind": "orthonormal", "side": side, "rank": 2, "dim": 8, "seed": 0, "index": 0}
    spec = SketchSpec(**(settings | changes))  # type: ignore[arg-type]
    factors: dict[str, Factor] = (
        {"B": to_train((5, 2)), "A": spec}
        if side == "right"
        else {"B": spec, "A": to_train((2, 5))}
    )
    return Adapter.of(factors, scale)


LOCAL = LocalSettings(lr=0.2, full_lr=0.01)


def test_orthonormal_rows_take_lr_times_scale_squared() -> None:
    found = effective_step(RoundInstructions({"w": sketched(1.5)}), LOCAL, 0.5)
    assert found == pytest.approx({"lr": 0.1, "gamma_min": 0.225, "gamma_max": 0.225})


def test_the_sketchs_own_scale_counts_unless_it_is_divided_out() -> None:
    wide = RoundInstructions({"w": sketched(1.5, normalize="identity")})  # A A^T = 4 I
    assert effective_step(wide, LOCAL, 1.0)["gamma_max"] == pytest.approx(0.2 * 2.25 * 4.0)
    preconditioned = LocalSettings(lr=0.2, precondition=True)
    assert effective_step(wide, preconditioned, 1.0)["gamma_max"] == pytest.approx(0.45)
    riemannian = LocalSettings(lr=0.2, adjust="riemannian")
    assert effective_step(wide, riemannian, 1.0)["gamma_max"] == pytest.approx(0.45)
    lora_pro = LocalSettings(lr=0.2, adjust="lora_pro")  # which divides by s^2, too
    assert effective_step(wide, lora_pro, 1.0)["gamma_max"] == pytest.approx(0.2)


def test_layers_give_a_range_on_either_side() -> None:
    downlink = RoundInstructions({"v": sketched(1.0), "w": sketched(3.0, side="left")})
    found = effective_step(downlink, LOCAL, 1.0)
    assert (found["gamma_min"], found["gamma_max"]) == pytest.approx((0.2, 1.8))


def test_without_sketches_there_is_only_the_learning_rate() -> None:
    both: dict[str, Factor] = {"B": to_train((5, 2)), "A": to_train((2, 8))}
    for downlink in (
        RoundInstructions({"w": Adapter.of(both, 2.0)}),
        RoundInstructions(dense={"w": to_train((5, 8))}),
    ):
        assert effective_step(downlink, LOCAL, 0.5) == {"lr": 0.1}


def test_two_frozen_factors_give_the_product_of_their_scales() -> None:
    """R under s B R A moves W by lr s^2 B B^T G A^T A: the c of B times the c of A."""
    adapter = sketched(1.5, normalize="identity")  # A A^T = 4 I
    left = sketched(1.5, side="left", dim=6, normalize="identity").factors["B"]  # B^T B = 3 I
    core = Adapter.of({"B": left, "R": to_train((2, 2)), "A": adapter.factors["A"]}, 1.5)
    found = effective_step(RoundInstructions({"w": core}), LOCAL, 1.0)
    assert found == pytest.approx({"lr": 0.2, "gamma_min": 5.4, "gamma_max": 5.4})


def test_adaptive_optimizers_have_no_such_step() -> None:
    for optimizer in ("adamw", "lora_rite"):
        local = LocalSettings(lr=0.2, optimizer=optimizer)
        assert effective_step(RoundInstructions({"w": sketched(1.5)}), local, 0.5) == {"lr": 0.1}


@pytest.mark.parametrize("normalize", ["rows", "identity"])
def test_gamma_is_the_step_that_sgd_takes_inside_the_sketch(normalize: str) -> None:
    """B <- -lr s G A^T moves W by s B A = -lr s^2 G A^T A: gamma along a direction of A's rows."""
    adapter = sketched(1.5, normalize=normalize)
    gamma = effective_step(RoundInstructions({"w": adapter}), LOCAL, 1.0)["gamma_max"]
    factor = adapter.factors["A"]
    assert factor.drawing is not None
    A = factor.draw()
    G = torch.ones(5, 2, dtype=torch.float64) @ A  # inside the row space
    moved = -0.2 * 1.5 * (G @ A.mT) @ A * 1.5
    torch.testing.assert_close(moved, -gamma * G, rtol=1e-12, atol=1e-12)
