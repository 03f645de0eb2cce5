"""Named distributions: their moments, their bits, and what they refuse."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.devices.distributions import (
    DISTRIBUTIONS,
    Choice,
    Constant,
    Distribution,
    LogNormal,
    Pareto,
    UniformSpread,
)
from fedraclora.errors import ConfigError
from fedraclora.rng import cohort_uniforms, hash_key

DRAWS = 40_000
ROWS: dict[str, Distribution] = {
    "constant": Constant(3.0),
    "uniform": UniformSpread(2.0, 5.0),
    "lognormal": LogNormal(4.0, 0.5),
    "pareto": Pareto(2.0, 3.5),
    "choice": Choice([1.0, 8.0, 2.0], [0.2, 0.3, 0.5]),
}
# Name: mean and variance, from the textbook formulas.
MOMENTS = {
    "constant": (3.0, 0.0),
    "uniform": (3.5, 9 / 12),
    "lognormal": (4 * math.exp(0.125), 16 * (math.exp(0.25) - 1) * math.exp(0.25)),
    "pareto": (3.5 * 2 / 2.5, 3.5 * 4 / (2.5**2 * 1.5)),
    "choice": (3.6, 0.2 + 0.3 * 64 + 0.5 * 4 - 3.6**2),
}


def uniforms(count: int, purpose: str = "test") -> torch.Tensor:
    return cohort_uniforms(hash_key(0, purpose), torch.arange(count))


def test_every_row_is_tested() -> None:
    assert set(ROWS) == set(MOMENTS) == set(DISTRIBUTIONS)
    assert all(type(row) is DISTRIBUTIONS[name] for name, row in ROWS.items())


@pytest.mark.parametrize("name", ROWS)
def test_the_mean_is_that_of_the_formula(name: str) -> None:
    mean, variance = MOMENTS[name]
    drawn = ROWS[name].quantile(uniforms(DRAWS))
    assert drawn.dtype == torch.float64
    assert bool((drawn > 0).all())
    # The mean of n draws has the standard deviation sqrt(variance / n).
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / DRAWS) + 1e-12)


@pytest.mark.parametrize("name", ["uniform", "lognormal", "choice"])
def test_the_variance_is_that_of_the_formula(name: str) -> None:
    mean, variance = MOMENTS[name]
    drawn = ROWS[name].quantile(uniforms(DRAWS))
    # Of the squared deviations the mean is the variance; their own deviation is in the sample.
    squares = (drawn - mean) ** 2
    tolerance = 5 * float(squares.std()) / math.sqrt(DRAWS)
    assert float(squares.mean()) == pytest.approx(variance, abs=tolerance)


@pytest.mark.parametrize("name", ROWS)
def test_quantiles_rise_and_the_median_is_where_it_should_be(name: str) -> None:
    values = ROWS[name].quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64))
    medians = {"constant": 3, "uniform": 3.5, "lognormal": 4, "pareto": 2 * 2 ** (1 / 3.5)}
    if name == "choice":  # in the order of its values: 1 up to 0.2, 8 up to 0.5, 2 from there
        assert values.tolist()[:2] + values.tolist()[3:] == [1.0, 8.0, 2.0, 2.0]
        return
    assert values.tolist() == sorted(values.tolist())
    assert float(values[2]) == pytest.approx(medians[name], rel=1e-12)


@pytest.mark.parametrize("name", ROWS)
@given(st.permutations(range(37)), st.integers(1, 37))
def test_a_value_has_the_same_bits_at_every_place(name: str, order: list[int], cut: int) -> None:
    u = uniforms(37)
    whole, places = ROWS[name].quantile(u), torch.tensor(order[:cut])
    assert torch.equal(ROWS[name].quantile(u[places]), whole[places])


def test_choices_come_as_often_as_asked() -> None:
    shares = [0.05, 0.0, 0.6, 0.35]
    drawn = Choice([4.0, 3.0, 2.0, 1.0], shares).quantile(uniforms(DRAWS))
    for value, share in zip((4.0, 3.0, 2.0, 1.0), shares, strict=True):
        # Binomial(n, share): five standard deviations.
        tolerance = 5 * math.sqrt(share * (1 - share) * DRAWS)
        assert int((drawn == value).sum()) == pytest.approx(share * DRAWS, abs=tolerance)


@pytest.mark.parametrize("shares", [None, [0.1] * 10, [1 / 3, 1 / 3, 1 / 3 - 5e-7]])
def test_the_ends_of_a_choice_are_inside(shares: list[float] | None) -> None:
    values = [float(i + 1) for i in range(len(shares or [0] * 7))]
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert Choice(values, shares).quantile(ends).tolist() == [1.0, float(len(values))]


def test_extremes_stay_finite() -> None:
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for row in (LogNormal(1.0, 10.0), Pareto(1.0, 0.1)):
        drawn = row.quantile(ends)
        assert bool((drawn.isfinite() & (drawn > 0)).all())


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("constant", {"value": 0.0}, r"value=0\.0: expected .*positive finite"),
        ("constant", {"value": math.inf}, "value=inf"),
        ("uniform", {"low": -1.0, "high": 2.0}, "low=-1.0"),
        ("uniform", {"low": 3.0, "high": 2.0}, r"high=2\.0: expected low \(3\.0\)"),
        ("lognormal", {"median": math.nan, "sigma": 1.0}, "median=nan"),
        ("lognormal", {"median": 1.0, "sigma": -0.1}, "sigma=-0.1"),
        (
            "lognormal",
            {"median": 1.0, "sigma": 11.0},
            r"sigma=11.0: expected a number in \[0, 10\]",
        ),
        ("pareto", {"least": 1.0, "shape": 0.01}, "shape=0.01"),
        ("pareto", {"least": 0.0, "shape": 1.0}, "least=0.0"),
        ("choice", {"values": []}, "values="),
        ("choice", {"values": [1.0, -2.0]}, r"values\[1\]=-2.0"),
        ("choice", {"values": [1.0, 2.0], "probabilities": [1.0]}, "1 numbers, but values has 2"),
        ("choice", {"values": [1.0, 2.0], "probabilities": [0.5, 0.6]}, "of sum 1.1"),
        ("choice", {"values": [1.0, 2.0], "probabilities": [-0.5, 1.5]}, "from 0 on"),
        ("choice", {"values": [1.0, 2.0], "probabilities": [math.nan, 1.0]}, "from 0 on"),
    ],
)
def test_what_is_no_distribution_is_refused(
    name: str, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        DISTRIBUTIONS[name](**arguments)
    assert re.split(r"[\[ =]", str(caught.value))[0] in arguments  # the path goes before it
