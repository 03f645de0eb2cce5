"""The convex problems of ``fedraclora theory``: their constants, and what is measured along a path.

Every constant is computed from the samples; none is fitted to a curve.
Runs are those of the framework's own loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
import yaml

from fedraclora.clients.engines import in_process
from fedraclora.data.clients import PartitionedData
from fedraclora.data.dataset import DataSet
from fedraclora.data.samples import Samples
from fedraclora.data.sources.synthetic import least_squares, logistic_regression
from fedraclora.data.task import SLOPES, Task
from fedraclora.errors import unknown
from fedraclora.experiments.theory.bounds import logistic_pl
from fedraclora.models.networks import build_linear
from fedraclora.protocol.method import Draw, Method, Plan, RoundInstructions, first_instructions
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.quantized import FULL
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.server.callbacks import Evaluate
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree


def federate(
    task: Task,
    method: Method,
    local: LocalConfig,
    *,
    rounds: int,
    cohort: int,
    seed: int,
    measure: Callable[[Tree], dict[str, float]] | None = None,
    weights: str = "uniform",
    chunk: int | None = None,
    kind: str = FULL,
) -> FedStrategy:
    """Run rounds through Flower's strategy over the in-process grid.

    Args:
        task: Model and client data, float64.
        method: What to run.
        local: Local settings.
        rounds: T.
        cohort: Clients of a round.
        seed: Of sketches, cohorts and shuffles.
        measure: Gives the metrics of the weights of every round; None: there are none.
        weights: Of clients: ``uniform`` or ``examples``.
        chunk: Clients that train as one batch; None: the cohort.
        kind: How numbers go up and down.

    Returns:
        The strategy, whose ledger has T + 1 rows.
    """
    clients = task.train.num_clients
    loop = LoopConfig(
        rounds, clients, cohort, chunk or cohort, seed, weights, "float64", kind, kind
    )
    trainer = CohortTrainer(task, plan_of(task), local, seed=seed, device=torch.device("cpu"))
    callbacks = [] if measure is None else [Evaluate(measure)]
    run = RoundsBuilder(method, trainer, loop, in_process(), callbacks=callbacks).ready()
    run.start()
    return run.strategy


def round_1(task: Task, method: Method) -> RoundInstructions:
    """Build what a method sends in round 1, from which the spectrum of E[H] is read."""
    draw = Draw(0)
    state = method.initial_state(start_of(task), plan_of(task), draw)
    return first_instructions(method, state, draw, 1)


def plan_of(task: Task) -> Plan:
    """Adapt every layer."""
    return make_plan(task.model, task.head, head_policy="lora", bias_policy="frozen")


def start_of(task: Task) -> Tree:
    """Return the base weights W^0."""
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}


WEIGHT = "fc1.weight"
MEASURES = ("gap", "gradient_sq", "sigma_sq", "zeta_sq")


@dataclass(frozen=True)
class Problem:
    """The mean loss of a linear model over clients of equally many samples, from W^0 = 0.

    Attributes:
        task: Model, loss and samples, float64.
        clients: M.
        optimum: f*.
        smoothness: L of f.
        own: L of each client's mean loss, [M].
        each: L of the loss of each sample, [M, S].
        curvature: Greatest number that is known to lie below every eigenvalue of the Hessian.
        pl: mu of the PL inequality on the sublevel set of W^0.
        pl_everywhere: Whether mu holds outside of that set, too, where SGD and local steps may go.
    """

    task: Task
    clients: int
    optimum: float
    smoothness: float
    own: torch.Tensor
    each: torch.Tensor
    curvature: float = 0.0
    pl: float = 0.0
    pl_everywhere: bool = False

    def batch_smoothness(self, batch: int) -> float:
        """Bound L of the mean loss of any ``batch`` samples of one client.

        The Hessian of the batch lies below the sum of those of its samples, so below the mean of
        the greatest; and below that of all S samples times S / batch.
        """
        greatest = self.each.topk(batch, dim=1).values.mean(dim=1)
        whole = self.own * (self.each.shape[1] / batch)
        return float(torch.minimum(greatest, whole).max())

    def batch_variance(self, batch: int) -> float:
        """Variance of the mean of a batch drawn without replacement, over that of one sample.

        Also that of the batches of a reshuffled epoch around the client's mean.
        """
        samples = self.each.shape[1]
        return (samples - batch) / (batch * (samples - 1)) if batch else 0.0

    def measure(self, weights: Tree) -> dict[str, float]:
        """Compute `MEASURES` at some weights; sigma_sq is that of single samples.

        The gradient of sample i is ``e_i x_i^T`` with the slope e_i of its loss, so its squared
        norm is ``||e_i||^2 ||x_i||^2`` and none is formed.
        """
        data = cast(PartitionedData, self.task.train)
        x = data.samples.inputs["x"]
        losses, slope = SLOPES[self.task.loss](x @ weights[WEIGHT].mT, data.samples.target)
        slope = slope.reshape(self.clients, -1, weights[WEIGHT].shape[0])
        x = x.reshape(self.clients, -1, x.shape[1])
        own = slope.mT @ x / x.shape[1]  # [M, m, n], gradients of the clients
        norms = (own * own).sum(dim=(1, 2))
        mean = own.mean(dim=0)
        gradient_sq = float((mean * mean).sum())
        singles = (slope * slope).sum(dim=2) * (x * x).sum(dim=2)
        return {
            "gap": float(losses.mean()) - self.optimum,
            "gradient_sq": gradient_sq,
            "sigma_sq": float((singles.mean(dim=1) - norms).mean()),
            "zeta_sq": float(norms.mean()) - gradient_sq,
        }


def from_data(data: DataSet, clients: int) -> Problem:
    """Make the problem of a synthetic data set: its optimum and curvature are in its facts."""
    built = build_linear(shape=data.sample_shape, classes=data.classes, seed=0, bias=False)
    model = built.model.double()
    with torch.no_grad():
        next(model.parameters()).zero_()
    x = data.train.inputs["x"]
    rows = np.split(np.arange(len(x)), clients)
    train = PartitionedData.of(data.train, rows)
    task = Task(model, (), data.loss, data.metrics, train, data.test, optimum=data.optimum)
    bend = 1.0 if data.loss == "squared_error" else 0.25  # greatest second derivative of the loss
    by_client = x.reshape(clients, -1, x.shape[1])
    squares = (by_client * by_client).sum(dim=2)
    own = torch.linalg.eigvalsh(by_client.mT @ by_client / by_client.shape[1])[:, -1]
    assert data.optimum is not None  # noqa: S101 - synthetic
    ground = Problem(
        task,
        clients,
        data.optimum,
        smoothness=float(str(data.info["smoothness"])),
        own=bend * own,
        each=bend * squares,
    )
    if data.loss == "squared_error":
        mu = float(str(data.info["strong_convexity"]))
        return replace(ground, curvature=mu, pl=mu, pl_everywhere=True)
    gap = ground.measure(start_of(task))["gap"]
    norm = float(squares.max()) ** 0.5
    return replace(ground, pl=logistic_pl(float(str(data.info["curvature"])), norm, gap))


def isotropic() -> DataSet:
    """Make ``1/2 ||W - Y||^2`` with W 6 x 12: L = mu = 1, and a step of 1 leaves 1 - r/n of it."""
    m, n = 6, 12
    target = torch_normal(generator(0, "theory", "isotropic"), n, m)
    samples = Samples({"x": n**0.5 * torch.eye(n, dtype=torch.float64)}, n**0.5 * target)
    info: dict[str, object] = {"smoothness": 1.0, "strong_convexity": 1.0}
    parts = [np.arange(n)]
    return DataSet(
        samples, samples, m, "squared_error", ("loss",), {}, (n,), parts, optimum=0.0, info=info
    )


DATA: dict[str, Callable[..., DataSet]] = {
    "isotropic": isotropic,
    "least_squares": least_squares,
    "logistic_regression": logistic_regression,
}
PROBLEMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@cache
def problem(name: str) -> Problem:
    """Make a problem by its name, once a process.

    Raises:
        ConfigError: If there is none of this name.
    """
    if name not in PROBLEMS:
        raise unknown("problem", name, PROBLEMS)
    settings = dict(PROBLEMS[name])
    return from_data(DATA[settings.pop("data")](**settings), settings.get("clients", 1))
