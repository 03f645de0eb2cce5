"""The proximal gradient against autograd through the penalty itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.compatibility import Features
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Factor, RoundInstructions
from fedraclora.rng import generator, torch_normal
from fedraclora.training.extras.prox import Prox, with_prox
from fedraclora.tree import Tree

K, ACTIVE, M, R, N, SCALE, MU = 3, 2, 5, 2, 4, 1.7, 0.3
SHAPES = {"w/B": (M, R), "w/A": (R, N), "b": (M,)}
RNG = generator(0, "prox")
VALUES = {n: torch_normal(RNG, K, *s) for n, s in SHAPES.items()}


def case(trained: str, per_client: bool) -> tuple[RoundInstructions, Tree, Tree, Tree]:
    """What is asked, leaves, starts and frozen factors where the named factors are trained."""
    lead = (K,) if per_client else (1,)
    starts = {n: torch_normal(RNG, *lead, *SHAPES[n]) for n in SHAPES}
    factors: dict[str, Factor] = {}
    frozen: Tree = {}
    for label in ("B", "A"):
        name = f"w/{label}"
        if label in trained:
            factors[label] = to_train(SHAPES[name])
        else:
            value = torch_normal(RNG, *(lead if per_client else ()), *SHAPES[name])
            factors[label] = value
            frozen[name] = value
            del starts[name]
    downlink = RoundInstructions(
        {"w": Adapter.of(factors, SCALE)}, {"b": to_train(SHAPES["b"], main=False)}
    )
    leaves = {n: VALUES[n][:ACTIVE] for n in starts}
    return downlink, leaves, starts, frozen


@pytest.mark.parametrize("per_client", [False, True])
@pytest.mark.parametrize("trained", ["B", "A", "BA"])
def test_the_closed_form_is_the_gradient_of_the_penalty(trained: str, per_client: bool) -> None:
    downlink, leaves, starts, frozen = case(trained, per_client)
    found = {n: torch.zeros_like(v) for n, v in leaves.items()}
    found = with_prox(found, leaves, starts=starts, frozen=frozen, downlink=downlink, mu=MU)
    for k in range(ACTIVE):

        def own(tree: Tree, name: str, k: int = k) -> torch.Tensor:
            value = tree[name]
            return value if value.dim() == 2 else value[k if value.shape[0] > 1 else 0]

        variables = {n: v[k].clone().requires_grad_() for n, v in leaves.items()}
        B, A = (variables.get(n, own(frozen, n) if n in frozen else None) for n in ("w/B", "w/A"))
        B0, A0 = (own(starts if n in starts else frozen, n) for n in ("w/B", "w/A"))
        assert B is not None
        assert A is not None
        b0 = starts["b"][k if per_client else 0]
        gap = SCALE * (B @ A - B0 @ A0)
        penalty = MU / 2 * (gap.square().sum() + (variables["b"] - b0).square().sum())
        wanted = torch.autograd.grad(penalty, list(variables.values()))
        for name, gradient in zip(variables, wanted, strict=True):
            torch.testing.assert_close(found[name][k], gradient, rtol=1e-12, atol=1e-12)


@given(st.floats(0.01, 10))
def test_the_pull_is_added_and_grows_with_mu(mu: float) -> None:
    downlink, leaves, starts, frozen = case("B", per_client=False)
    once = {n: torch.zeros_like(v) for n, v in leaves.items()}
    once = with_prox(once, leaves, starts=starts, frozen=frozen, downlink=downlink, mu=1.0)
    found = {n: torch.ones_like(v) for n, v in leaves.items()}
    found = with_prox(found, leaves, starts=starts, frozen=frozen, downlink=downlink, mu=mu)
    for name, value in found.items():
        torch.testing.assert_close(value, 1.0 + mu * once[name], rtol=1e-12, atol=1e-12)


def test_there_is_no_pull_at_the_start() -> None:
    downlink, _, starts, frozen = case("BA", per_client=True)
    leaves = {n: v[:ACTIVE].clone() for n, v in starts.items()}
    found = {n: torch.zeros_like(v) for n, v in leaves.items()}
    found = with_prox(found, leaves, starts=starts, frozen=frozen, downlink=downlink, mu=MU)
    assert all(float(g.abs().max()) < 1e-13 for g in found.values())


def test_a_term_of_three_factors_is_refused() -> None:
    factors: dict[str, Factor] = {k: to_train((2, 2)) for k in ("B", "R", "A")}
    sent = RoundInstructions({"w": Adapter.of(factors, 1.0)})
    (said,) = Features([Prox(1.0), sent], sent).conflicts()
    assert "local.prox" in said
    assert "three factors" in said
