"""What a round does to the weights is what the theory of arXiv 2410.08305 says it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task, squared_error
from fedraclora.experiments.theory import problems as runs
from fedraclora.experiments.theory.problems import start_of
from fedraclora.models.networks import build_mlp
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.method import Counters, Draw, Method
from fedraclora.sketch import SKETCHES
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg
from fedraclora.strategies.shared.layerwise import RoundContext
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree
from tests import common

SEED = 5
M, N, R = 5, 8, 3
ALPHA = 4.5  # s = 1.5
LR = 0.2
ORTHONORMAL = [name for name, kind in SKETCHES.items() if kind.basis is not None]
WHOLE = LocalSettings(lr=LR, batch_size=0)  # every local step sees all samples of the client


Make = Callable[..., Task]


normal = partial(common.normal, seed=SEED)


def task_of(model: nn.Module, samples: Samples, parts: list[int]) -> Task:
    """A regression in float64, its rows dealt out in order: ``parts`` samples to each client."""
    rows = np.split(np.arange(sum(parts)), np.cumsum(parts)[:-1])
    data = PartitionedData.of(samples, list(rows))
    return Task(model.double(), (), "squared_error", ("loss",), data, samples)


def linear_task(*parts: int) -> Task:
    """Least squares on one weight of M x N."""
    inputs = {"x": normal(sum(parts), N, key="x")}
    target = normal(sum(parts), M, key="y")
    return task_of(nn.Sequential(nn.Linear(N, M, bias=False)), Samples(inputs, target), [*parts])


def deep_task(*parts: int) -> Task:
    """Regression with two adapted layers, neither of them square, and frozen biases."""
    built = build_mlp(shape=(N,), classes=M, seed=0, hidden=(7, 6))
    inputs = {"x": normal(sum(parts), N, key="x")}
    target = normal(sum(parts), M, key="y")
    return task_of(built.model, Samples(inputs, target), [*parts])


def federate(
    task: Task,
    method: Method,
    local: LocalSettings,
    *,
    rounds: int = 1,
    cohort: int | None = None,
    seed: int = SEED,
    weights: str = "samples",
) -> FedStrategy:
    """Run rounds in chunks of three clients."""
    cohort = cohort or task.train.num_clients
    settings = {"rounds": rounds, "cohort": cohort, "seed": seed}
    return runs.federate(task, method, local, **settings, weights=weights, chunk=3)


def gradient(task: Task, weights: Tree) -> Tree:
    """Gradient of the mean training loss over all samples, by autograd on dense weights."""
    leaves = {n: w.detach().clone().requires_grad_() for n, w in weights.items()}
    data = task.train
    assert isinstance(data, PartitionedData)
    output = functional_call(task.model, leaves, (data.samples.inputs["x"],))
    losses, _ = squared_error(output, data.samples.target)
    names = [n for n in leaves if n.endswith("weight")]
    found = torch.autograd.grad(losses.mean(), [leaves[n] for n in names])
    return dict(zip(names, found, strict=True))


def sketch(strategy: FedStrategy, name: str, round_: int = 1) -> torch.Tensor:
    """The drawn factor of one layer in a round, with ``merge_every=1``."""
    method, state = strategy.method, strategy.state
    assert isinstance(method, FedRacLora)
    before = replace(state, counters=Counters(sketch=round_ - 1))
    layer = method.layer(before, name)
    drawn, _ = method.sides(layer.shape)
    spec = method.factors(layer, RoundContext(round_, Draw(SEED)))[drawn]
    return Factor.of(spec).draw()


def projected(step: torch.Tensor, drawn: torch.Tensor, train: str) -> torch.Tensor:
    """G H_A for a right sketch, H_B G for a left one, H the projection onto the sketch."""
    onto: torch.Tensor = torch.linalg.pinv(drawn)
    return step @ onto @ drawn if train == "B" else drawn @ onto @ step


def weights_of(strategy: FedStrategy) -> Tree:
    return strategy.method.weights(strategy.state, strategy.draw)


def rac(kind: str = "orthonormal", **settings: object) -> FedRacLora:
    return FedRacLora(**{"rank": R, "alpha": ALPHA, "sketch": kind, **settings})  # type: ignore[arg-type]


def assert_close(found: torch.Tensor, wanted: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


# ---- One step -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("kind", ORTHONORMAL)
@pytest.mark.parametrize("make", [linear_task, deep_task])
def test_one_step_is_a_projected_gradient_step(make: Make, kind: str, train: str) -> None:
    task = make(9)
    strategy = federate(task, rac(kind, train=train), WHOLE)
    start, found = start_of(task), weights_of(strategy)
    gamma = LR * (ALPHA / R) ** 2
    for name, G in gradient(task, start).items():
        step = projected(G, sketch(strategy, name), train)
        assert float(step.abs().max()) > 1e-3
        assert_close(found[name], start[name] - gamma * step, 1e-12)


@pytest.mark.parametrize("normalize", ["rows", "identity", "none"])
@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("kind", SKETCHES)
def test_the_preconditioner_gives_the_projected_step_for_any_sketch(
    kind: str, train: str, normalize: str
) -> None:
    task = deep_task(9)
    method = rac(kind, train=train, normalize=normalize, density=0.6)
    strategy = federate(task, method, replace(WHOLE, precondition=True))
    start, found = start_of(task), weights_of(strategy)
    gamma = LR * (ALPHA / R) ** 2
    for name, G in gradient(task, start).items():
        step = projected(G, sketch(strategy, name), train)
        assert_close(found[name], start[name] - gamma * step, 1e-12)


def test_without_the_preconditioner_the_step_is_that_of_the_gram_matrix() -> None:
    task = linear_task(9)
    strategy = federate(task, rac("gaussian"), WHOLE)
    start, A = start_of(task)["0.weight"], sketch(strategy, "0.weight")
    G = gradient(task, start_of(task))["0.weight"]
    gamma = LR * (ALPHA / R) ** 2
    assert_close(weights_of(strategy)["0.weight"], start - gamma * G @ A.T @ A, 1e-12)


@pytest.mark.parametrize("weights", ["samples", "uniform"])
def test_one_step_of_a_cohort_is_the_projected_step_of_its_mean_gradient(weights: str) -> None:
    parts = (4, 1, 7)
    task = linear_task(*parts)
    strategy = federate(task, rac(), WHOLE, weights=weights)
    start, H = start_of(task)["0.weight"], sketch(strategy, "0.weight")
    shares = (
        torch.tensor(parts, dtype=torch.float64) if weights == "samples" else torch.ones(3).double()
    )
    mean = torch.zeros(M, N, dtype=torch.float64)
    data = task.train
    assert isinstance(data, PartitionedData)
    for client, share in enumerate(shares / shares.sum()):
        own = data.client(client)
        x, y = own.inputs["x"], own.target
        mean += share * (x @ start.T - y).T @ x / len(own)
    gamma = LR * (ALPHA / R) ** 2
    wanted = start - gamma * projected(mean, H, "B")
    assert_close(weights_of(strategy)["0.weight"], wanted, 1e-12)


# ---- Many steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_full_rank_is_fedavg(momentum: float, train: str) -> None:
    task = deep_task(6, 1, 11, 4, 9)
    local = LocalSettings(lr=0.05, epochs=2, batch_size=4, momentum=momentum)
    wanted = federate(task, FedAvg(), local, rounds=4, cohort=3)
    found = federate(task, rac(rank="full", alpha="auto", train=train), local, rounds=4, cohort=3)
    start = start_of(task)
    for name, value in weights_of(wanted).items():
        if name.endswith("weight"):
            assert float((value - start[name]).abs().max()) > 1e-2
        assert_close(weights_of(found)[name], value, 1e-10)


def test_full_rank_is_fedavg_at_a_rate_divided_by_the_scale_squared() -> None:
    task = linear_task(6, 1, 11)
    local = LocalSettings(lr=0.05, steps=5, batch_size=4)
    wanted = federate(task, FedAvg(), local, rounds=3)
    scale = 3.0 / N
    found = federate(task, rac(rank=N, alpha=3.0), replace(local, lr=0.05 / scale**2), rounds=3)
    assert_close(weights_of(found)["0.weight"], weights_of(wanted)["0.weight"], 1e-10)


@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_heavy_ball_steps_on_a_factor_are_projected_ones_on_the_weight(
    nesterov: bool, train: str
) -> None:
    task, mu, steps = deep_task(9), 0.8, 6
    local = replace(WHOLE, lr=0.05, steps=steps, momentum=mu, nesterov=nesterov)
    strategy = federate(task, rac(train=train), local)
    gamma = 0.05 * (ALPHA / R) ** 2
    W = start_of(task)
    V = {n: torch.zeros_like(w) for n, w in W.items()}
    for _ in range(steps):
        for name, G in gradient(task, W).items():
            step = projected(G, sketch(strategy, name), train)
            V[name] = mu * V[name] + step
            W[name] = W[name] - gamma * (step + mu * V[name] if nesterov else V[name])
    for name, value in weights_of(strategy).items():
        assert_close(value, W[name], 1e-12)


# ---- Many rounds --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "train", "precondition"),
    [("orthonormal", "B", False), ("coordinate", "A", False), ("gaussian", "B", True)],
)
def test_a_round_contracts_the_squared_norm_by_one_less_the_share_of_the_rank(
    kind: str, train: str, precondition: bool
) -> None:
    # 1/2 ||W||^2 / N as a regression: the samples are the unit vectors, the targets are zero.
    samples = Samples({"x": torch.eye(N).double()}, torch.zeros(N, M).double())
    task = task_of(nn.Sequential(nn.Linear(N, M, bias=False)), samples, [N])
    with torch.no_grad():
        next(task.model.parameters()).copy_(normal(M, N, key="W"))
    local = LocalSettings(lr=N, batch_size=0, precondition=precondition)  # gamma = 1
    before = float(start_of(task)["0.weight"].square().sum())
    ratios = []
    for seed in range(300):
        strategy = federate(task, rac(kind, alpha="auto", train=train), local, seed=seed)
        ratios.append(float(weights_of(strategy)["0.weight"].square().sum()) / before)
    error = float(np.std(ratios, ddof=1)) / len(ratios) ** 0.5
    wanted = 1 - R / (N if train == "B" else M)
    assert 0 < error < 0.02
    assert abs(float(np.mean(ratios)) - wanted) < 4 * error


def test_a_sketch_that_is_never_drawn_anew_confines_the_whole_run() -> None:
    task = linear_task(6, 5, 9)
    strategy = federate(
        task, rac(merge_every=None), LocalSettings(lr=0.05, batch_size=32), rounds=6
    )
    A, start = sketch(strategy, "0.weight"), start_of(task)["0.weight"]
    change = weights_of(strategy)["0.weight"] - start
    assert torch.equal(strategy.state.base["0.weight"], start)
    assert float(change.norm()) > 0.1
    assert_close(change @ torch.linalg.pinv(A) @ A, change, 1e-12)


@pytest.mark.parametrize(("rounds", "ranks"), [(2, 2), (3, 2), (4, 4), (6, 4), (7, 5)])
def test_each_draw_adds_its_rank_to_the_update(rounds: int, ranks: int) -> None:
    task = linear_task(6, 5, 9)
    method = rac(rank=2, merge_every=3)
    strategy = federate(task, method, LocalSettings(lr=0.05, batch_size=32), rounds=rounds)
    change = weights_of(strategy)["0.weight"] - start_of(task)["0.weight"]
    found = int(torch.linalg.matrix_rank(change, atol=1e-9))
    assert found == ranks  # 2 a draw, and no more than M = 5 in all
