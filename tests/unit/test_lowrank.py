"""Low-rank algebra against dense algebra."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.errors import ShapeError
from fedraclora.lowrank.algebra import (
    balanced_factors,
    fix_signs,
    negated,
    product_norm,
    stack_products,
    sum_products,
    sylvester,
    truncated_product,
)
from tests.common import normal

sizes = st.integers(1, 7)


@given(sizes, sizes, sizes, sizes)
def test_a_stack_of_products_is_the_dense_sum(K: int, m: int, r: int, n: int) -> None:
    L, R, w = normal(K, m, r), normal(K, r, n, seed=1), normal(K, seed=2)
    left, right = stack_products(L, R, w)
    assert (left.shape, right.shape) == ((m, K * r), (K * r, n))
    dense = torch.stack([w[k] * (L[k] @ R[k]) for k in range(K)]).sum(dim=0)
    torch.testing.assert_close(left @ right, dense, rtol=1e-12, atol=1e-12)


def test_stacking_works_in_float64() -> None:
    left, right = stack_products(torch.ones(1, 2, 1), torch.ones(1, 1, 3), torch.ones(1))
    assert left.dtype == right.dtype == torch.float64


@pytest.mark.parametrize(
    ("left", "right"), [((2, 3, 4), (3, 4, 5)), ((2, 3, 4), (2, 5, 4)), ((2, 4, 3), (2, 4, 5))]
)
def test_products_that_do_not_fit_are_refused(
    left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    with pytest.raises(ShapeError, match=r"need \[K, m, r\] and \[K, r, n\]") as caught:
        stack_products(torch.zeros(left), torch.zeros(right), torch.zeros(2))
    assert str(left) in str(caught.value)


@given(sizes, sizes, sizes, st.integers(1, 9))
def test_the_truncation_by_two_qrs_is_the_dense_svd(m: int, q: int, n: int, rank: int) -> None:
    left, right = normal(m, q), normal(q, n, seed=1)
    u, s, vt = truncated_product(left, right, rank)
    k = min(rank, m, q, n)
    assert (u.shape, s.shape, vt.shape) == ((m, k), (k,), (k, n))
    U, S, Vt = torch.linalg.svd(left @ right, full_matrices=False)
    torch.testing.assert_close(s, S[:k], rtol=1e-10, atol=1e-10)
    best = U[:, :k] @ torch.diag(S[:k]) @ Vt[:k]
    torch.testing.assert_close(u @ torch.diag(s) @ vt, best, rtol=1e-9, atol=1e-9)
    eye = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(u.mT @ u, eye, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vt @ vt.mT, eye, rtol=1e-10, atol=1e-10)


def test_a_truncation_loses_the_tail() -> None:
    left = torch.diag(torch.tensor([5.0, 4.0, 3.0, 0.0]))[:, :3]
    u, s, vt = truncated_product(left, torch.eye(3), 1)
    assert s.tolist() == pytest.approx([5.0])
    error = torch.linalg.norm(left.double() - u @ torch.diag(s) @ vt)
    assert float(error) == pytest.approx(5.0)  # sqrt(4^2 + 3^2)


@pytest.mark.parametrize(
    ("left", "right", "rank"), [((3, 2), (3, 4), 1), ((3, 2), (2, 4), 0), ((3, 2), (2, 4), -1)]
)
def test_an_impossible_truncation_is_refused(
    left: tuple[int, ...], right: tuple[int, ...], rank: int
) -> None:
    with pytest.raises(ShapeError, match=f"to rank {rank}"):
        truncated_product(torch.zeros(left), torch.zeros(right), rank)


@given(sizes, sizes, sizes)
def test_the_norm_of_a_product_is_that_of_the_dense_matrix(m: int, q: int, n: int) -> None:
    left, right = normal(m, q), normal(q, n, seed=1)
    wanted = float(torch.linalg.norm(left @ right))
    assert product_norm(left, right) == pytest.approx(wanted, rel=1e-12)


def test_the_norm_of_a_tall_thin_product_needs_no_dense_matrix() -> None:
    """Three times (3, 4) and (1, 0, 0, ..): the branch of two QRs, by hand."""
    left, right = torch.zeros(50, 1), torch.zeros(1, 60)
    left[0, 0], left[7, 0], right[0, 3] = 3.0, 4.0, 2.0
    assert product_norm(left, right) == pytest.approx(10.0, rel=1e-14)


def test_a_small_norm_is_not_lost_in_cancellation() -> None:
    """[a, -a] [b'; b] with b' next to b: large factors of a small product."""
    a, b = normal(40, 1), normal(1, 30, seed=1)
    tiny = 1e-9 * normal(1, 30, seed=2)
    left, right = torch.cat([a, -a], dim=1), torch.cat([b + tiny, b])
    wanted = float(torch.linalg.norm(a @ tiny))
    assert product_norm(left, right) == pytest.approx(wanted, rel=1e-5)


@given(sizes, sizes, sizes)
def test_signs_do_not_depend_on_those_that_came(m: int, q: int, n: int) -> None:
    """A library may turn any singular pair round: the result is the same, to the bit."""
    left, right = normal(m, q), normal(q, n, seed=1)
    turn = torch.where(torch.arange(q) % 2 == 0, -1.0, 1.0).double()
    one, other = fix_signs(left, right), fix_signs(left * turn, turn[:, None] * right)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[0] @ one[1], left @ right, rtol=1e-12, atol=1e-12)
    assert bool((one[0].gather(0, one[0].abs().argmax(0, keepdim=True)) > 0).all())


@given(sizes, sizes, sizes, st.integers(1, 9))
def test_balanced_factors_share_the_singular_values(m: int, q: int, n: int, rank: int) -> None:
    left, right = normal(m, q), normal(q, n, seed=1)
    B, A = balanced_factors(left, right, rank)
    assert (B.shape, A.shape) == ((m, rank), (rank, n))
    u, s, vt = truncated_product(left, right, rank)
    torch.testing.assert_close(B @ A, u @ torch.diag(s) @ vt, rtol=1e-10, atol=1e-10)
    gram = torch.diag(torch.nn.functional.pad(s, (0, rank - len(s))))
    torch.testing.assert_close(B.mT @ B, gram, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(A @ A.mT, gram, rtol=1e-9, atol=1e-9)


def test_a_sum_of_products_is_the_dense_sum() -> None:
    one, other = (normal(4, 2), normal(2, 5)), (normal(4, 3, seed=1), normal(3, 5, seed=1))
    left, right = sum_products(one, negated(other))
    torch.testing.assert_close(left @ right, one[0] @ one[1] - other[0] @ other[1])


@pytest.mark.parametrize("lost", [False, True])
def test_a_sylvester_equation_is_solved_where_it_can_be(lost: bool) -> None:
    left, right = (normal(2, 3, 4, seed=seed) for seed in (0, 1))
    if lost:  # one direction that neither side has
        left, right = (
            left * torch.tensor([1.0, 1, 0])[:, None],
            right * torch.tensor([1.0, 0, 1])[:, None],
        )
        left[:, 1] = 0
    left, right = left @ left.mT, right @ right.mT
    X = normal(2, 3, 3, seed=2)
    target = left @ X + X @ right
    found = sylvester(left, right, target)
    torch.testing.assert_close(left @ found + found @ right, target, rtol=1e-9, atol=1e-11)
    assert bool(found.isfinite().all())
