"""The laws of orthonormal bases and of the blocks that cover them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedraclora.sketch import Constants, SketchSpec, bases, constants
from fedraclora.sketch.bases import haar_rows

FRAMES = ["coordinate", "orthonormal", "srht"]


def frame(kind: str, rank: int, dim: int, seed: int = 5) -> SketchSpec:
    return SketchSpec(kind, "right", rank, dim, seed=seed, index=0)


def cover(kind: str, rank: int, dim: int, index: int, seed: int = 5) -> SketchSpec:
    return SketchSpec(kind, "right", rank, dim, seed=seed, index=index, blocks="cover")


def assert_mean(samples: torch.Tensor, expected: torch.Tensor | float) -> None:
    """Every entry of the mean over the first axis lies within 5 standard errors."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    assert ((samples.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


def values(tensor: torch.Tensor) -> list[float]:
    return sorted(set(tensor.flatten().tolist()))


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(("rank", "dim"), [(1, 1), (1, 2), (3, 8), (5, 12), (7, 7), (40, 64)])
def test_rows_of_a_frame_are_orthonormal(kind: str, rank: int, dim: int) -> None:
    A = frame(kind, rank, dim).draw()
    torch.testing.assert_close(A @ A.mT, eye(rank), rtol=0, atol=1e-13)


def test_srht_with_a_power_of_two_is_hadamard_and_else_a_cosine_transform() -> None:
    whole = frame("srht", 4, 4).draw()
    assert values(whole.abs()) == [0.5]
    whole = frame("srht", 6, 6).draw()
    n, k, i = 6, torch.arange(6.0).double()[:, None], torch.arange(6.0).double()
    dct = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
    dct[0] = math.sqrt(1 / n)
    flips = whole[(whole.abs() - dct[0, 0]).abs().sum(dim=1).argmin()].sign()
    match = (whole * flips) @ dct.mT
    torch.testing.assert_close(match.abs().round(), match.abs(), rtol=0, atol=1e-12)
    assert match.abs().sum(dim=0).allclose(torch.ones(n, dtype=torch.float64))


def test_haar_rows_have_the_moments_of_a_uniform_orthogonal_matrix() -> None:
    n = 3
    q = torch.stack([haar_rows((k, "test", 0), n, 0, n) for k in range(4000)])
    assert_mean(q, 0.0)
    assert_mean(q**2, 1 / n)
    assert_mean(q**4, 3 / (n * (n + 2)))
    assert_mean(q[:, 0, 0] ** 2 * q[:, 1, 1] ** 2, (n + 1) / (n * (n - 1) * (n + 2)))
    assert_mean(torch.linalg.det(q), 0.0)


def test_rows_of_a_haar_basis_do_not_depend_on_whether_it_is_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = haar_rows((4, "test", 0), 9, 5, 8)
    monkeypatch.setattr(bases, "_STORED", 8)
    torch.testing.assert_close(haar_rows((4, "test", 0), 9, 5, 8), stored, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(("rank", "dim"), [(3, 12), (3, 8), (5, 7), (4, 16), (7, 7), (1, 5)])
def test_blocks_of_one_basis_are_orthogonal_and_a_cover_spans_the_space(
    kind: str, rank: int, dim: int
) -> None:
    count = math.ceil(dim / rank)
    blocks = [cover(kind, rank, dim, i).draw() for i in range(count)]
    rows = torch.cat(blocks)
    whole = rows[: dim // rank * rank]
    torch.testing.assert_close(whole @ whole.mT, eye(len(whole)), rtol=0, atol=1e-13)
    assert torch.linalg.matrix_rank(rows) == dim


@settings(deadline=None)
@given(data=st.data(), kind=st.sampled_from(FRAMES), seed=st.integers(0, 2**63 - 1))
def test_a_block_is_orthonormal_and_holds_its_rows_of_both_bases(
    data: st.DataObject, kind: str, seed: int
) -> None:
    dim = data.draw(st.integers(1, 12), "dim")
    rank = data.draw(st.integers(1, dim), "rank")
    index = data.draw(st.integers(0, 20), "index")
    spec = cover(kind, rank, dim, index, seed)
    A = spec.draw()
    torch.testing.assert_close(A @ A.mT, eye(rank), rtol=0, atol=1e-12)
    # Blocks of one row each are the sequence itself.
    first = index * rank
    rows = [replace(spec, rank=1, index=i).draw() for i in range(first, first + rank)]
    both = torch.cat(rows)
    torch.testing.assert_close(both @ A.mT @ A, both, rtol=0, atol=1e-12)
    kept = min(rank, dim - first % dim)
    torch.testing.assert_close(A[:kept], both[:kept], rtol=0, atol=1e-12)
    if kind == "coordinate":
        assert values(A) in ([0.0, 1.0], [1.0])


@pytest.mark.parametrize("kind", FRAMES)
def test_each_basis_of_a_cover_is_new(kind: str) -> None:
    first, second = (cover(kind, 4, 16, i).draw() for i in (0, 4))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", FRAMES)
def test_a_block_across_two_bases_has_no_preferred_direction(kind: str) -> None:
    dim = 8 if kind == "srht" else 7
    A = torch.stack([cover(kind, 5, dim, 1, seed).draw() for seed in range(2000)])
    assert_mean(A.mT @ A, 5 / dim * eye(dim))


@pytest.mark.parametrize("kind", FRAMES)
def test_a_cover_has_no_constants_unless_it_is_everything(kind: str) -> None:
    assert constants(cover(kind, 4, 16, 0)) == Constants(0.0, 1.0)
    assert constants(cover(kind, 5, 5, 0)) == Constants(1.0, 1.0)
