"""LoRA-RITE: how it moves a product of factors, whatever the split."""

from __future__ import annotations

import pytest
import torch

from fedraclora.training.extras.lora_rite import CohortRite, negligible, polar
from fedraclora.training.extras.pairs import Pair
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree
from tests.common import normal

K, M, R, N, S = 2, 6, 3, 8, 0.7
CONFIG = LocalSettings(lr=0.5, optimizer="lora_rite", beta1=0.8, beta2=0.9, eps=1e-12)
RATES = {"w/B": 0.03, "w/A": 0.03, "b": 0.03}


TARGET = normal(K, M, N, key="target")


def gradients_of(values: Tree, frozen: Tree) -> Tree:
    """Of a quadratic of the weight with slopes that differ by entry."""
    B, A = (values.get(n, frozen.get(n)) for n in ("w/B", "w/A"))
    assert B is not None
    assert A is not None
    G = (S * B @ A - TARGET) * torch.linspace(0.2, 3.0, N)
    found = {"w/B": S * G @ A.mT, "w/A": S * B.mT @ G}
    return {n: g for n, g in found.items() if n in values}


def path(
    values: Tree, frozen: Tree, steps: int, config: LocalSettings = CONFIG
) -> list[torch.Tensor]:
    """Products after each step."""
    values = {n: v.clone() for n, v in values.items()}
    optimizer = CohortRite(config, values, RATES, [Pair("w", S, frozen)])
    found = []
    for _ in range(steps):
        optimizer.step(gradients_of(values, frozen))
        whole = frozen | values
        found.append(whole["w/B"] @ whole["w/A"])
    return found


BOTH = {"w/B": normal(K, M, R), "w/A": normal(K, R, N)}


def test_the_path_of_the_product_does_not_depend_on_its_split() -> None:
    Q = torch.eye(R) + 0.4 * normal(K, R, R, key="Q")
    other = {"w/B": 50.0 * BOTH["w/B"] @ Q, "w/A": torch.linalg.inv(Q) @ BOTH["w/A"] / 50.0}
    one, two = path(BOTH, {}, 6), path(other, {}, 6)
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-8)
    assert float((one[-1] - one[0]).abs().max()) > 0.05  # it has moved


def test_state_is_carried_to_the_basis_of_the_step() -> None:
    """Without its transport a momentum from the last basis would make the split visible again."""
    Q = torch.linalg.qr(normal(K, R, R, key="Q")).Q
    other = {"w/B": BOTH["w/B"] @ Q, "w/A": Q.mT @ BOTH["w/A"]}
    config = LocalSettings(lr=0.5, optimizer="lora_rite", beta1=0.95, beta2=0.5, eps=1e-12)
    for first, second in zip(path(BOTH, {}, 8, config), path(other, {}, 8, config), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-8)


def test_the_first_step_of_b_under_orthonormal_rows_is_its_whitened_gradient() -> None:
    A = torch.linalg.qr(normal(N, R)).Q.mT
    values = {"w/B": normal(K, M, R)}
    before, gradient = values["w/B"].clone(), gradients_of(values, {"w/A": A})["w/B"]
    CohortRite(CONFIG, values, RATES, [Pair("w", S, {"w/A": A})]).step({"w/B": gradient})
    U, _, Vt = torch.linalg.svd(gradient, full_matrices=False)
    wanted = before - RATES["w/B"] * M**0.5 * U @ Vt
    torch.testing.assert_close(values["w/B"], wanted, rtol=1e-9, atol=1e-9)


def test_rows_of_a_frozen_factor_do_not_matter_beyond_what_they_span() -> None:
    A = normal(R, N)
    Q = torch.eye(R) + 0.4 * normal(R, R, key="Q")
    one = path({"w/B": BOTH["w/B"]}, {"w/A": A}, 5)
    two = path({"w/B": BOTH["w/B"] @ torch.linalg.inv(Q)}, {"w/A": Q @ A}, 5)
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-9)


def test_a_factor_at_zero_leaves_its_partner_where_it_is_for_a_step() -> None:
    values = {"w/B": torch.zeros(K, M, R).double(), "w/A": normal(K, R, N)}
    A = values["w/A"].clone()
    optimizer = CohortRite(CONFIG, values, RATES, [Pair("w", S, {})])
    optimizer.step(gradients_of(values, {}))
    assert torch.equal(values["w/A"], A)
    assert torch.count_nonzero(values["w/B"]) == values["w/B"].numel()
    optimizer.step(gradients_of(values, {}))
    assert not torch.equal(values["w/A"], A)
    assert all(bool(v.isfinite().all()) for v in values.values())


def test_weight_decay_shrinks_both_factors_and_the_rest_takes_adamw() -> None:
    config = LocalSettings(lr=0.5, optimizer="lora_rite", weight_decay=0.5)
    values = {n: v.clone() for n, v in BOTH.items()} | {"b": normal(K, 4)}
    begun = {n: v.clone() for n, v in values.items()}
    gradient = normal(K, 4, key="g")
    optimizer = CohortRite(config, values, RATES, [Pair("w", S, {})])
    optimizer.step(
        {"w/B": torch.zeros(K, M, R).double(), "w/A": torch.zeros(K, R, N).double(), "b": gradient}
    )
    for name in BOTH:
        torch.testing.assert_close(values[name], begun[name] * (1 - 0.03 * 0.5))
    plain = torch.nn.Parameter(begun["b"].clone())
    plain.grad = gradient
    torch.optim.AdamW([plain], lr=0.03, weight_decay=0.5, eps=config.eps).step()
    torch.testing.assert_close(values["b"], plain.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_polar_form_is_one(dtype: torch.dtype) -> None:
    tall = normal(K, N, R).to(dtype)
    basis, inverse = polar(tall)
    loose = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    )
    torch.testing.assert_close(basis.mT @ basis, torch.eye(R, dtype=dtype).expand(K, R, R), **loose)
    torch.testing.assert_close(basis @ torch.linalg.inv(inverse), tall, **loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_rounding_is_no_direction(dtype: torch.dtype) -> None:
    """A product of rank one has noise in its other columns, which must not be blown up."""
    tall = (normal(K, N, 1) @ normal(K, 1, R)).to(dtype)
    basis, inverse = polar(tall)
    assert torch.linalg.matrix_rank(inverse.double(), rtol=1e-3).tolist() == [1, 1]
    size = float(inverse.abs().max() * tall.abs().max())
    assert size < 2.0
    assert float(basis.abs().max()) < 1.01
    assert 0 < negligible(N, dtype) < 1e-9
