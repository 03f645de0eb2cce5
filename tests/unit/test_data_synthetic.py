"""The optimum of the synthetic problems is the optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fedraclora.data import DATASETS, make_partition
from fedraclora.data.sources.synthetic import logistic_optimum
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError

LEAST = {"clients": 5, "samples": 7, "features": 4, "outputs": 3, "dtype": "float64"}
LOGIT = {"clients": 6, "samples": 30, "features": 3, "dtype": "float64"}


def objective(data, weight: np.ndarray) -> float:
    output = data.train.inputs["x"].double() @ torch.from_numpy(weight).T
    target = data.train.target
    loss, parts = LOSSES[data.loss](output, target.double() if data.classes > 1 else target)
    return float(loss.sum() / parts.sum())


def test_least_squares_optimum_is_below_every_neighbour():
    data = DATASETS["least_squares"](**LEAST, heterogeneity=0.5)
    x, y = data.train.inputs["x"].numpy(), data.train.target.numpy()
    best = np.linalg.solve(x.T @ x, x.T @ y).T
    assert objective(data, best) == pytest.approx(data.optimum, rel=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert objective(data, best + 1e-3 * rng.standard_normal(best.shape)) > data.optimum


def test_least_squares_optimum_is_that_of_the_stored_samples():
    data = DATASETS["least_squares"](**LEAST | {"dtype": "float32"}, noise=0.0, heterogeneity=0.0)
    assert data.train.inputs["x"].dtype == torch.float32
    assert 0 < data.optimum < 1e-12


def test_curvature_bounds_the_objective():
    data = DATASETS["least_squares"](**LEAST)
    rng = np.random.default_rng(1)
    x, y = data.train.inputs["x"].numpy(), data.train.target.numpy()
    best = np.linalg.solve(x.T @ x, x.T @ y).T
    for _ in range(20):
        step = rng.standard_normal(best.shape)
        rise = objective(data, best + step) - data.optimum
        square = (step**2).sum() / 2
        assert data.info["strong_convexity"] * square <= rise + 1e-12
        assert rise <= data.info["smoothness"] * square + 1e-12


def test_condition_is_the_condition_of_the_features():
    data = DATASETS["least_squares"](clients=50, samples=400, features=6, condition=100.0)
    curvature = data.info["smoothness"] / data.info["strong_convexity"]
    assert 80 < curvature < 125


def test_logistic_optimum_agrees_with_another_solver():
    data = DATASETS["logistic_regression"](**LOGIT, heterogeneity=0.3)
    found = minimize(lambda w: objective(data, w[None]), np.zeros(3), method="BFGS", tol=1e-9)
    assert data.optimum == pytest.approx(found.fun, abs=1e-10)
    assert data.optimum <= found.fun + 1e-13


def test_logistic_curvature_is_that_of_the_loss_at_its_minimum():
    data = DATASETS["logistic_regression"](**LOGIT)
    best = minimize(lambda w: objective(data, w[None]), np.zeros(3), method="BFGS", tol=1e-9).x
    step = 1e-3

    def along(direction: np.ndarray) -> float:
        ends = (objective(data, (best + sign * step * direction)[None]) for sign in (1, -1))
        return (sum(ends) - 2 * data.optimum) / step**2

    directions = np.random.default_rng(2).standard_normal((2000, 3))
    found = min(along(d / np.linalg.norm(d)) for d in directions)
    assert data.info["curvature"] == pytest.approx(found, rel=5e-3)


def test_without_heterogeneity_all_clients_have_the_same_weights():
    data = DATASETS["least_squares"](**LEAST, noise=0.0, heterogeneity=0.0)
    assert data.optimum < 1e-25


def test_clients_are_given_with_equal_sizes():
    data = DATASETS["logistic_regression"](**LOGIT)
    parts, info = make_partition(data, name="given", clients=None, seed=0)
    assert [len(part) for part in parts] == [30] * 6
    assert info["clients"] == 6
    assert np.concatenate(parts).tolist() == list(range(180))
    assert data.columns["client"][parts[4]].tolist() == [4] * 30
    assert data.test is data.train
    assert data.metrics == ("loss",)


def test_the_problem_is_its_seed():
    one, two, other = (DATASETS["least_squares"](**LEAST, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train.target, two.train.target)
    assert not torch.equal(one.train.inputs["x"], other.train.inputs["x"])


def test_a_thousand_clients_are_no_other_case():
    data = DATASETS["least_squares"](clients=1000, samples=2, features=3)
    assert data.parts is not None
    assert len(data.parts) == 1000
    assert len(data.train) == 2000


def published(seed: int, clients: int, alpha: float, beta: float) -> list[tuple]:
    """Draw Synthetic(alpha, beta) one after another, as the code of FedProx's authors does."""
    rng = np.random.RandomState(seed)
    counts = rng.lognormal(4, 2, clients).astype(int) + 50
    label_mean = rng.normal(0, alpha, clients)
    input_mean = rng.normal(0, beta, clients)
    centres = [rng.normal(input_mean[k], 1, 60) for k in range(clients)]
    drawn = []
    for k in range(clients):
        weight = rng.normal(label_mean[k], 1, (60, 10))
        bias = rng.normal(label_mean[k], 1, 10)
        spread = np.diag([(j + 1) ** -1.2 for j in range(60)])
        x = rng.multivariate_normal(centres[k], spread, counts[k])
        drawn.append((x, np.array([np.argmax(row @ weight + bias) for row in x])))
    return drawn


@pytest.mark.parametrize(("seed", "alpha", "beta"), [(0, 1.0, 1.0), (7, 0.5, 0.0)])
def test_synthetic_of_fedprox_has_the_draws_of_its_authors(seed, alpha, beta):
    made = DATASETS["fedprox_synthetic"](
        clients=5, alpha=alpha, beta=beta, seed=seed, dtype="float64"
    )
    before = 0
    for rows, (x, y) in zip(made.parts, published(seed, 5, alpha, beta), strict=True):
        kept, held = len(rows), len(x) - len(rows)
        assert kept == int(0.9 * len(x))
        found = made.train.take(torch.from_numpy(rows))
        np.testing.assert_allclose(found.inputs["x"].numpy(), x[:kept], rtol=1e-9, atol=1e-12)
        assert found.target.tolist() == y[:kept].tolist()
        assert made.test.target[before : before + held].tolist() == y[kept:].tolist()
        before += held
    assert before == len(made.test)


def test_synthetic_iid_of_fedprox_has_one_labeller():
    made = DATASETS["fedprox_synthetic"](clients=6, alpha=None, beta=None, dtype="float64")
    rng = np.random.RandomState(0)
    rng.lognormal(4, 2, 6)
    weight, bias = rng.normal(0, 1, (60, 10)), rng.normal(0, 1, 10)
    labels = (made.train.inputs["x"].numpy() @ weight + bias).argmax(axis=1)
    assert labels.tolist() == made.train.target.tolist()
    assert abs(made.train.inputs["x"].mean()) < 0.02


SEPARABLE = (np.array([[1.0, 0.2], [2.0, -1.0], [-1.0, 0.5]]), np.array([1, 1, 0]))
DEPENDENT = (np.array([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0]]), np.array([1, 1, 0]))
# Sample 1 pulls the second weight to infinity, the others hold the first one.
HALF_SEPARABLE = (np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]), np.array([1, 1, 0]))


@pytest.mark.parametrize("case", [SEPARABLE, DEPENDENT, HALF_SEPARABLE])
def test_a_loss_without_a_minimum_is_refused(case):
    with pytest.raises(ConfigError, match=r"no finite minimum.*data.flip"):
        logistic_optimum(*case)


BAD = {
    "clients": ("least_squares", {"clients": 0}, "clients=0"),
    "samples": ("least_squares", {"samples": 1.5}, "data.samples=1.5"),
    "features": ("logistic_regression", {"features": -1}, "data.features=-1"),
    "outputs": ("least_squares", {"outputs": 0}, "data.outputs=0"),
    "noise": ("least_squares", {"noise": -1.0}, "data.noise=-1.0"),
    "heterogeneity": (
        "least_squares",
        {"heterogeneity": float("nan")},
        "heterogeneity=nan",
    ),
    "condition": (
        "logistic_regression",
        {"condition": 0.5},
        "condition=0.5: expected .* from 1 on",
    ),
    "flip": ("logistic_regression", {"flip": 0.5}, "data.flip=0.5"),
    "dtype": (
        "least_squares",
        {"dtype": "bfloat16"},
        "data.dtype 'bfloat16'.*float32, float64",
    ),
    "alpha": ("fedprox_synthetic", {"clients": 2, "alpha": -1.0}, "data.alpha=-1.0"),
    "separable": ("logistic_regression", {"flip": 0.0}, "no finite minimum"),
}


@pytest.mark.parametrize(("name", "change", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_the_key(name, change, words):
    base = {"least_squares": LEAST, "logistic_regression": LOGIT}.get(name, {})
    with pytest.raises(ConfigError, match=words):
        DATASETS[name](**base | change)
