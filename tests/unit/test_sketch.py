"""The laws of random sketches. `python tests/unit/test_sketch.py` rewrites the golden digests."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedraclora import sketch as draw
from fedraclora.errors import ConfigError
from fedraclora.rng import hash_key
from fedraclora.sketch import SKETCHES, SketchSpec, check_sketch, constants

GOLDEN = Path(__file__).parents[1] / "golden" / "sketches.json"
KINDS = sorted(SKETCHES)
FRAMES = ["coordinate", "orthonormal", "srht"]
N, R = 16, 4


def spec_of(kind: str, rank: int = R, dim: int = N, index: int = 0, **other: object) -> SketchSpec:
    base = SketchSpec(kind, "right", rank, dim, seed=2**63 - 25, index=index)
    return replace(base, **other)  # type: ignore[arg-type]


def draws(spec: SketchSpec, count: int) -> torch.Tensor:
    return torch.stack([draw._drawn(replace(spec, index=i)) for i in range(count)])


def assert_mean(samples: torch.Tensor, expected: torch.Tensor | float) -> None:
    """Every entry of the mean over the first axis lies within 5 standard errors."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    assert ((samples.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()


def values(tensor: torch.Tensor) -> list[float]:
    return sorted(set(tensor.flatten().tolist()))


def projections(rows: torch.Tensor) -> torch.Tensor:
    inverse: torch.Tensor = torch.linalg.pinv(rows)
    return inverse @ rows


def eye(n: int) -> torch.Tensor:
    return torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_left_is_the_transpose_of_right(kind: str) -> None:
    right, left = spec_of(kind), spec_of(kind, side="left")
    assert right.draw().shape == (R, N)
    assert right.draw().dtype == torch.float64
    assert torch.equal(left.draw(), right.draw().mT)
    assert left.draw().is_contiguous()


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [*((kind, "independent") for kind in KINDS), *((kind, "cover") for kind in FRAMES)],
)
def test_equal_specs_draw_equal_bits(kind: str, blocks: str) -> None:
    spec = spec_of(kind, 5, 12, index=2, blocks=blocks)
    assert torch.equal(draw._drawn(spec), draw._drawn(replace(spec)))
    assert torch.equal(spec.draw(), draw._drawn(spec))


@pytest.mark.parametrize("kind", KINDS)
def test_another_index_seed_or_layer_draws_another_sketch(kind: str) -> None:
    layers = [hash_key(3, "sketch", name) >> 65 for name in ("fc1.weight", "fc2.weight")]
    specs = [spec_of(kind, 6, 64, index=i, seed=s) for s in (0, 1, *layers) for i in (0, 1)]
    drawn = {spec.draw().numpy().tobytes() for spec in specs}
    assert len(drawn) == len(specs)


@pytest.mark.parametrize("dim", [N, 1 << 14, 1 << 17])
def test_sketches_of_every_size_are_remembered(dim: int) -> None:
    spec = spec_of("count_sketch", 3, dim)
    assert spec.draw() is spec.draw()


def test_the_small_sketches_of_a_deep_model_are_remembered() -> None:
    specs = [spec_of("count_sketch", 2, N, index=i) for i in range(300)]
    first = [spec.draw() for spec in specs]
    assert all(spec.draw() is held for spec, held in zip(specs, first, strict=True))


def test_entries_of_each_kind() -> None:
    def raw(kind: str, dim: int = N) -> torch.Tensor:
        return draws(spec_of(kind, R, dim, normalize="none", density=0.25), 200)

    assert values(raw("rademacher")) == [-1, 1]
    assert_mean(raw("rademacher").flatten(), 0.0)
    assert values(raw("sparse_sign")) == [-1, 0, 1]
    assert_mean(raw("sparse_sign").abs().flatten(), 0.25)
    assert raw("sparse_sign").sum() != 0
    assert values(raw("count_sketch").abs().sum(dim=1)) == [1]
    assert_mean(raw("count_sketch").abs().sum(dim=2), N / R)
    assert values(raw("coordinate")) == [0, 1]
    assert values(raw("coordinate").sum(dim=2)) == [1]
    assert values(raw("srht").abs()) == [0.25]
    kaiming = raw("kaiming_uniform", 9)
    assert kaiming.min() >= -1 / 3
    assert kaiming.max() < 1 / 3
    assert_mean(kaiming.flatten() ** 2, 1 / 27)
    assert_mean(raw("gaussian").flatten() ** 2, 1.0)
    assert_mean(raw("gaussian").flatten() ** 4, 3.0)


def test_density_one_is_rademacher() -> None:
    sparse = spec_of("sparse_sign", density=1.0, normalize="none").draw()
    assert torch.equal(sparse, spec_of("rademacher", normalize="none").draw())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", draw.NORMALIZATIONS)
def test_gram_scale_is_the_mean_diagonal_of_the_gram_matrix(kind: str, normalize: str) -> None:
    spec = spec_of(kind, normalize=normalize, density=0.3)
    A = draws(spec, 1000)
    gram = A @ A.mT
    assert_mean(gram, spec.gram_scale * eye(R))
    assert_mean(A.mT @ A, spec.gram_scale * R / N * eye(N))
    if kind in FRAMES:
        torch.testing.assert_close(gram, (spec.gram_scale * eye(R)).expand_as(gram))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_units_and_identity_is_larger_by_the_root_of_dim_over_rank(kind: str) -> None:
    rows, identity = spec_of(kind, 3, 12), spec_of(kind, 3, 12, normalize="identity")
    assert rows.gram_scale == 1.0
    assert identity.gram_scale == 4.0
    torch.testing.assert_close(identity.draw(), 2.0 * rows.draw(), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("gaussian", 12.0),
        ("rademacher", 12.0),
        ("orthonormal", 1.0),
        ("coordinate", 1.0),
        ("srht", 1.0),
        ("sparse_sign", 3.0),
        ("count_sketch", 4.0),
        ("kaiming_uniform", 1 / 3),
    ],
)
def test_raw_gram_scale_by_hand(kind: str, scale: float) -> None:
    assert spec_of(kind, 3, 12, normalize="none", density=0.25).gram_scale == scale


@pytest.mark.parametrize(
    ("kind", "density"), [*((kind, 0.1) for kind in KINDS), ("sparse_sign", 0.25)]
)
def test_mean_projection_is_what_constants_says(kind: str, density: float) -> None:
    spec = spec_of(kind, density=density)
    H = projections(draws(spec, 3000))
    got = constants(spec)
    assert got.lambda_min == got.lambda_max
    assert_mean(H, got.lambda_min * eye(N))
    ranks = H.diagonal(dim1=1, dim2=2).sum(dim=1)
    # The formula of the signs leaves out more than pairs: far below the error of this test.
    error = 5 * ranks.std() / math.sqrt(len(ranks)) + 1e-3
    assert abs(ranks.mean() - got.lambda_min * N) <= error


@pytest.mark.parametrize("kind", KINDS)
def test_projection_is_symmetric_idempotent_and_its_trace_is_the_rank(kind: str) -> None:
    rows = draws(spec_of(kind, 3, 7), 20)
    H = projections(rows)
    torch.testing.assert_close(H @ H, H, rtol=0, atol=1e-12)
    torch.testing.assert_close(H.mT, H, rtol=0, atol=1e-12)
    rank = torch.linalg.matrix_rank(rows).double()
    torch.testing.assert_close(H.diagonal(dim1=1, dim2=2).sum(dim=1), rank)


def test_constants_by_hand() -> None:
    assert constants(spec_of("gaussian", 4, 16)).lambda_min == 0.25
    assert constants(spec_of("gaussian", 5, 3)).lambda_min == 1.0
    assert constants(spec_of("count_sketch", 2, 2)).lambda_min == 0.75
    # Two signs in R^2 are parallel half of the time.
    assert constants(spec_of("rademacher", 2, 2)).lambda_min == 0.75
    assert constants(spec_of("sparse_sign", 1, 2, density=0.5)).lambda_min == 0.375
    assert constants(spec_of("rademacher", 50, 1)).lambda_min <= 1.0


def golden_specs() -> dict[str, SketchSpec]:
    specs = {
        f"{kind} {normalize}": spec_of(kind, 3, 8, index=5, normalize=normalize)
        for kind in KINDS
        if kind not in {"gaussian", "orthonormal"}  # of floats, which differ between builds
        for normalize in draw.NORMALIZATIONS
    }
    specs |= {
        f"{kind} cover {index}": spec_of(kind, 3, 8, index=index, blocks="cover")
        for kind in ("coordinate", "srht")
        for index in range(4)
        if (kind, index) != ("srht", 2)  # of two bases, by a QR
    }
    specs["count_sketch left"] = spec_of("count_sketch", 5, 33, side="left")
    return specs


def bits(spec: SketchSpec) -> str:
    return hashlib.sha256(draw._drawn(spec).numpy().tobytes()).hexdigest()


def test_exact_sketches_have_the_golden_bits() -> None:
    digests = {name: bits(spec) for name, spec in golden_specs().items()}
    assert digests == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "gausian"}, "unknown sketch 'gausian'"),
        ({"normalize": "row"}, "are: identity, none, rows"),
        ({"blocks": "covers"}, "There are: cover, independent"),
        ({"side": "rigth"}, "sketch side 'rigth'"),
        ({"rank": 0}, "rank >= 1"),
        ({"index": -1}, "index=-1"),
        ({"kind": "orthonormal", "rank": 17}, "rank=17 cannot exceed dim=16"),
        ({"density": 0.0}, "sketch is 0.0"),
        ({"blocks": "cover"}, "'gaussian' sketch has none"),
    ],
)
def test_bad_specs_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(spec_of("gaussian"), **change)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_check_sketch_takes_what_exists(kind: str) -> None:
    for normalize in draw.NORMALIZATIONS:
        check_sketch(kind, normalize, "independent")
    if kind in FRAMES:
        check_sketch(kind, "rows", "cover")
    else:
        with pytest.raises(ConfigError, match="or blocks: independent"):
            check_sketch(kind, "rows", "cover")


if __name__ == "__main__":
    digests = {name: bits(spec) for name, spec in golden_specs().items()}
    GOLDEN.write_text(json.dumps(digests, indent=2) + "\n")
