"""Measured curves of the framework's own loop lie within the bounds of `experiments.theory.bounds`.

The mean over 20 seeds, less three standard errors, is at most the bound, after every round: on the
isotropic quadratic the bound is the expectation, so the plain mean crosses it half of the time.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedraclora.experiments.theory.cases import TheoryCase, all_cases
from fedraclora.experiments.theory.verdict import Judged, judge, run

SEEDS = range(20)
CASES = {case.name: case for case in all_cases()}
ROUNDS = {  # fewer than in the command, but every theorem, side and kind of problem
    "rates/isotropic: r = 4": 9,
    "rates/linear: r = 4": 15,
    "rates/linear, left: r = 3": 10,
    "rates/logistic: r = 4": 12,
    "sketches/right: sparse_sign": 10,
    "stochastic/linear, SGD: r = 12": 20,
    "stochastic/linear, reshuffling: r = 3 of 6, left": 15,
    "stochastic/linear, federated, all 8: r = 12": 15,
    "stochastic/linear, federated, 3 of 8: r = 3": 15,
    "stochastic/logistic, federated, 3 of 8: r = 8": 15,
    "fewer bits/gradient descent: int4": 15,
    "cover/near-isotropic: cover, r = 4": 9,
    "chain/linear, sgd: half kept, c = 1, r = 4": 10,
    "chain/linear, sgd: half kept, c = (r/d)^(1/4), r = 4": 10,
    "chain/linear, federated: default: three kept, links of 2, r = 4": 10,
    "links/isotropic: links of 4": 12,
}
ALIKE = {
    "rates/linear: r = 4",
    "rates/linear, left: r = 3",
    "stochastic/linear, SGD: r = 12",
    "stochastic/linear, federated, all 8: r = 12",
    "stochastic/logistic, federated, 3 of 8: r = 8",
    "chain/linear, sgd: half kept, c = (r/d)^(1/4), r = 4",
}


def judged(case: TheoryCase) -> Judged:
    return judge(case, [run(case, seed) for seed in SEEDS])


# In the short suite one of a bound; `fedraclora theory` runs them all.
@pytest.mark.slow
@pytest.mark.short(when=lambda name: name not in ALIKE)
@pytest.mark.parametrize("name", ROUNDS)
def test_curves_lie_within_their_bounds(name: str) -> None:
    found = judged(replace(CASES[name], rounds=ROUNDS[name]))
    assert set(found.curves) == ({"gradient", "gap"} if found.descent.given.pl else {"gradient"})
    for curve in found.curves.values():
        assert curve.holds, f"{curve.quantity} lies {curve.excess:.3g} above its bound"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rates/isotropic: r = 4", "links/isotropic: links of 4"])
def test_the_bound_of_the_isotropic_quadratic_is_the_expectation(name: str) -> None:
    curve = judged(replace(CASES[name], rounds=12)).curves["gap"]
    assert (abs(curve.mean - curve.bound)[1:] <= 4 * curve.error[1:]).all()


@pytest.mark.slow
def test_a_bound_for_a_larger_rank_is_crossed() -> None:
    case = replace(CASES["rates/isotropic: r = 4"], rounds=9)
    paths = [run(case, seed) for seed in SEEDS]
    assert judge(case, paths).holds
    assert not judge(replace(case, rank=6), paths).holds


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_all_curves_of_the_command_lie_within_their_bounds(name: str) -> None:
    assert judged(CASES[name]).holds
