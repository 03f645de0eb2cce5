"""Gradients of two factors adjusted by each other: what they do to the weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.compatibility import Features
from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Factor, RoundInstructions
from fedraclora.protocol.program import GRADIENT, PLAIN, ClientChunk, ClientProgram, GradientStage
from fedraclora.rng import generator, torch_normal
from fedraclora.training.extras.pairs import (
    Adjustment,
    Pair,
    Precondition,
    lora_pro,
    projected,
    riemannian,
)
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree
from tests.common import accepted, normal
from tests.example_program import Example

K, M, R, N, S = 3, 5, 2, 7, 0.6
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
Rule = Callable[[Pair, Tree, Tree, float], Tree]


G = normal(K, M, N, key="G")
VALUES = {"w/B": normal(K, M, R), "w/A": normal(K, R, N)}
PAIR = Pair("w", S, {})


def gradients_of(values: Tree) -> Tree:
    B, A = values["w/B"], values["w/A"]
    return {"w/B": S * G @ A.mT, "w/A": S * B.mT @ G}


def moved(values: Tree, steps: Tree) -> torch.Tensor:
    """Change of ``s B A`` to first order, where the factors change by minus ``steps``."""
    B, A = values["w/B"], values["w/A"]
    return -S * (steps["w/B"] @ A + B @ steps["w/A"])


def onto_rows(A: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(A) @ A


def onto_columns(B: torch.Tensor) -> torch.Tensor:
    return B @ torch.linalg.pinv(B)


@pytest.mark.parametrize("rule", [riemannian, lora_pro])
def test_the_step_does_not_depend_on_how_the_product_is_split(rule: Rule) -> None:
    Q = torch.eye(R) + 0.4 * normal(K, R, R, key="Q")
    other = {"w/B": 9.0 * VALUES["w/B"] @ Q, "w/A": torch.linalg.inv(Q) @ VALUES["w/A"] / 9.0}
    one = moved(VALUES, rule(PAIR, gradients_of(VALUES), VALUES, 0.0))
    two = moved(other, rule(PAIR, gradients_of(other), other, 0.0))
    torch.testing.assert_close(one, two, **TIGHT)
    plain = moved(VALUES, gradients_of(VALUES))
    assert not torch.allclose(plain, moved(other, gradients_of(other)), rtol=0.1)


def test_the_riemannian_step_projects_from_both_sides() -> None:
    PB, PA = onto_columns(VALUES["w/B"]), onto_rows(VALUES["w/A"])
    found = moved(VALUES, riemannian(PAIR, gradients_of(VALUES), VALUES, 0.0))
    torch.testing.assert_close(found, -(S**2) * (G @ PA + PB @ G), **TIGHT)


def test_lora_pro_moves_the_weight_as_near_to_the_gradient_as_factors_can() -> None:
    PB, PA = onto_columns(VALUES["w/B"]), onto_rows(VALUES["w/A"])
    found = moved(VALUES, lora_pro(PAIR, gradients_of(VALUES), VALUES, 0.0))
    outside = (torch.eye(M) - PB) @ G @ (torch.eye(N) - PA)
    torch.testing.assert_close(found, -(G - outside), **TIGHT)


@given(st.integers(0, 2**31), st.sampled_from([0.01, 1.0]))
def test_lora_pro_is_the_nearest_to_the_plain_gradients_of_all_that_move_so(
    seed: int, size: float
) -> None:
    plain = gradients_of(VALUES)
    found = lora_pro(PAIR, plain, VALUES, 0.0)
    X = size * torch_normal(generator(seed, "X"), K, R, R)
    other = {"w/B": found["w/B"] - VALUES["w/B"] @ X, "w/A": found["w/A"] + X @ VALUES["w/A"]}
    torch.testing.assert_close(moved(VALUES, found), moved(VALUES, other), **TIGHT)
    near, far = (
        sum((tree[n] - plain[n]).square().sum(dim=(1, 2)) for n in plain) for tree in (found, other)
    )
    assert bool((torch.as_tensor(near) < torch.as_tensor(far)).all())


@pytest.mark.parametrize("rule", [riemannian, lora_pro])
def test_a_factor_at_zero_waits_while_the_other_one_moves(rule: Rule) -> None:
    values = VALUES | {"w/B": torch.zeros(K, M, R).double()}
    found = rule(PAIR, gradients_of(values), values, 1e-8)
    assert torch.count_nonzero(found["w/A"]) == 0
    scale = S**2 if rule is riemannian else 1.0
    torch.testing.assert_close(
        moved(values, found), -scale * G @ onto_rows(values["w/A"]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("own", [False, True])
def test_under_a_frozen_factor_the_step_is_that_of_projected_sgd(own: bool) -> None:
    A = normal(*((K, R, N) if own else (R, N)), key="A")
    gradient = {"w/B": S * G @ A.mT}
    pair, values = Pair("w", S, {"w/A": A}), {"w/B": VALUES["w/B"]}
    wanted = projected({"w/A": A})(gradient)["w/B"]
    found = riemannian(pair, gradient, values, 0.0)["w/B"]
    torch.testing.assert_close(found, wanted, **TIGHT)
    found = lora_pro(pair, gradient, values, 0.0)["w/B"]
    torch.testing.assert_close(found, wanted / S**2, **TIGHT)


def test_with_orthonormal_rows_and_b_alone_it_is_plain_sgd() -> None:
    A = torch.linalg.qr(normal(N, R)).Q.mT
    gradient, pair = {"w/B": S * G @ A.mT}, Pair("w", S, {"w/A": A})
    found = riemannian(pair, gradient, {"w/B": VALUES["w/B"]}, 0.0)["w/B"]
    torch.testing.assert_close(found, gradient["w/B"], **TIGHT)


@pytest.mark.parametrize("rule", [riemannian, lora_pro])
def test_a_budget_is_a_smaller_pair(rule: Rule) -> None:
    kept = torch.tensor([[True, False], [True, True], [False, True]])
    plain = gradients_of(VALUES)
    cut = {"w/B": plain["w/B"] * kept[:, None], "w/A": plain["w/A"] * kept[..., None]}
    found = rule(Pair("w", S, {}, kept), cut, VALUES, 1e-3)
    for k in range(K):
        at = kept[k]
        small = {"w/B": VALUES["w/B"][k : k + 1, :, at], "w/A": VALUES["w/A"][k : k + 1, at]}
        own = {"w/B": plain["w/B"][k : k + 1, :, at], "w/A": plain["w/A"][k : k + 1, at]}
        wanted = rule(PAIR, own, small, 1e-3)
        torch.testing.assert_close(found["w/B"][k, :, at], wanted["w/B"][0], **TIGHT)
        torch.testing.assert_close(found["w/A"][k, at], wanted["w/A"][0], **TIGHT)
        assert torch.count_nonzero(found["w/B"][k, :, ~at]) == 0
        assert torch.count_nonzero(found["w/A"][k, ~at]) == 0


def chunk_of(downlink: RoundInstructions, frozen: Tree | None = None) -> ClientChunk:
    return ClientChunk(
        downlink=downlink,
        clients=torch.arange(K),
        seed=0,
        round_=1,
        key=None,
        values=VALUES,
        starts=VALUES,
        frozen=frozen or {},
        ranks=None,
        masks={},
    )


def test_what_belongs_to_no_adapter_keeps_its_gradient() -> None:
    adjust = Adjustment("riemannian", 1e-6).hooks(chunk_of(downlink_of(BOTH)))[GradientStage.BUDGET]
    plain = gradients_of(VALUES) | {"head.bias": normal(K, 4)}
    found = adjust(plain, VALUES)
    assert list(found) == list(plain)
    assert found["head.bias"] is plain["head.bias"]
    assert not torch.equal(found["w/B"], plain["w/B"])


def test_single_precision_stays_single() -> None:
    values = {n: t.float() for n, t in VALUES.items()}
    plain = {n: t.float() for n, t in gradients_of(VALUES).items()}
    found = lora_pro(PAIR, plain, values, 1e-6)
    wanted = lora_pro(PAIR, gradients_of(VALUES), VALUES, 1e-6)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-4, atol=1e-4)


def downlink_of(factors: dict[str, Factor], program: ClientProgram = PLAIN) -> RoundInstructions:
    return RoundInstructions({"w": Adapter.of(factors, S)} if factors else {}, program=program)


BOTH: dict[str, Factor] = {"B": to_train((M, R)), "A": to_train((R, N))}
CORE: dict[str, Factor] = {
    "B": normal(M, R),
    "R": to_train((R, R)),
    "A": normal(R, N),
}


@pytest.mark.parametrize(
    ("factors", "program", "words"),
    [
        ({}, PLAIN, "a method without adapters"),
        (
            CORE,
            PLAIN,
            "three factors",
        ),
        (BOTH, Example(2), "own rule for local steps"),
    ],
)
def test_what_it_does_not_fit_is_refused(
    factors: dict[str, Factor], program: ClientProgram, words: str
) -> None:
    said = [*Features([Precondition(), sent := downlink_of(factors, program)], sent).conflicts()]
    assert any("local.precondition=true" in line and words in line for line in said)


def test_a_probe_has_nothing_to_adjust() -> None:
    probe = RoundInstructions(dense={"w": to_train((M, N))}, program=GRADIENT)
    assert Precondition().pairs(chunk_of(probe)) == []


def test_a_preconditioner_needs_a_factor_that_is_frozen() -> None:
    """The gradients of two trained factors would silently stay as they are."""
    A = VALUES["w/A"]
    one = chunk_of(downlink_of({"B": to_train((M, R)), "A": A[0]}), {"w/A": A})
    hook = Precondition().hooks(one)[GradientStage.PROGRAM]
    kept = hook({"w/B": VALUES["w/B"]}, VALUES)["w/B"]
    torch.testing.assert_close(kept @ (A @ A.mT), VALUES["w/B"], **TIGHT)
    (said,) = Features([Precondition(), both := downlink_of(BOTH)], both).conflicts()
    assert "train both factors (w)" in said
    assert "local.adjust=riemannian" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adjust": "lora-pro"}, "local.adjust 'lora-pro'"),
        ({"damping": 0.0}, "local.damping=0.0"),
        (
            {"adjust": "riemannian", "precondition": True},
            "local.adjust=riemannian and local.precondition=true",
        ),
        (
            {"adjust": "lora_pro", "optimizer": "lora_rite"},
            "local.adjust=lora_pro and local.optimizer=lora_rite",
        ),
        (
            {"adjust": "lora_pro", "gate_penalty": 0.5},
            "local.adjust=lora_pro and local.gate_penalty=0.5",
        ),
        (
            {"gate_penalty": 0.0},
            "local.gate_penalty=0.0",
        ),
        (
            {"optimizer": "lora_rite", "optimizer_state": "merge"},
            "moments end with the round",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        accepted("local", LocalSettings(**{"lr": 0.5, **changes}))  # type: ignore[arg-type]
    assert words in str(caught.value)
