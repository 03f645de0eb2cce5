"""The 3 x 3 example of arXiv 2410.08305, section 3: LoRA need not find what full training finds.

``f(W) = vec(W)^T M vec(W) + b^T vec(W)`` with M = diag(10, 1, ..., 1) and b = 1, so L = 20, at
rank 1. The paper's b, start, initialisation and chain length are not known; here W^0 = 0, LoRA's A
has N(0, 1) entries, B = 0, and a chain has a link every `CHAIN` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import override

from fedraclora.data.samples import Partitioned, Samples
from fedraclora.data.task import Task
from fedraclora.errors import ClientError
from fedraclora.experiments.theory.runs import federate
from fedraclora.protocol.method import Method
from fedraclora.strategies.fed_rac_lora import FedRacLora
from fedraclora.strategies.fedavg import FedAvg
from fedraclora.strategies.fedavg_lora import FedAvgLora
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree

Array = npt.NDArray[np.float64]

SIZE = 3
SMOOTHNESS = 20.0
M = torch.ones(SIZE, SIZE, dtype=torch.float64)  # its diagonal, by entry of W
M[0, 0] = 10
CHAIN = 20  # steps of a link, and of a round here
METHODS: dict[str, Method] = {
    "full": FedAvg(),
    "LoRA": FedAvgLora(rank=1, alpha=1.0, initial="gaussian"),
    "COLA": FedAvgLora(rank=1, alpha=1.0, initial="gaussian", resample_every=1),
    "asymmetric LoRA": FedRacLora(rank=1, alpha=1.0, resample_every=None),
    "RAC-LoRA": FedRacLora(rank=1, alpha=1.0),
}
DIVERGED = 1e6  # gap beyond which a path counts as diverged
START = 2.025  # gap of W^0 = 0: the sum of 1 / (4 M)


class Weighted(nn.Module):
    """``c * (W e_j)`` with a scale c of its own for each input: a quadratic with any diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(SIZE, SIZE, bias=False)
        nn.init.zeros_(self.fc1.weight)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the outputs [N, 3] of inputs [N, 6]: a unit vector, then the scales."""
        output: torch.Tensor = self.fc1(x[:, :SIZE]) * x[:, SIZE:]
        return output


def task() -> Task:
    """Write f as a regression: sample j sees column j of W, the loss is a mean over samples.

    ``(1/3) 1/2 (c w - y)^2 = M w^2 + w + const`` for ``c = sqrt(6 M)`` and ``y = -3 / c``.
    """
    scales = (2 * SIZE * M).sqrt().mT
    x = torch.cat([torch.eye(SIZE, dtype=torch.float64), scales], dim=1)
    samples = Samples({"x": x}, -SIZE / scales)
    data = Partitioned.of(samples, [np.arange(SIZE)])
    return Task(Weighted().double(), (), "squared_error", ("loss",), data, samples)


def measure(weights: Tree) -> dict[str, float]:
    """Compute the gap ``sum M (w - w*)^2``, w* = -1 / (2 M)."""
    return {"gap": float((M * (weights["fc1.weight"] + 1 / (2 * M)) ** 2).sum())}


LINKS = {"full": {1.0: 30, 0.1: 60}, "small": {1.0: 2, 0.1: 2}}  # by size, by step over 1 / L


@dataclass(frozen=True)
class Trial:
    """One path: a method, a step over 1 / L, a number of links, a seed."""

    method: str
    share: float
    links: int
    seed: int


def run(trial: Trial) -> Array:
    """Run the method, and return the gap after each link; infinite from where the path diverged."""
    local = LocalConfig(lr=trial.share / SMOOTHNESS, batch_size=0, steps=CHAIN, shuffle=False)
    return follow(task(), METHODS[trial.method], local, trial, measure)


def follow(
    task: Task,
    method: Method,
    local: LocalConfig,
    trial: Trial,
    measure: Callable[[Tree], dict[str, float]],
) -> Array:
    """Run a path of one client; its gap after each link, infinite from where it diverged."""
    gaps: list[float] = []

    def watch(weights: Tree) -> dict[str, float]:
        found = measure(weights)
        gaps.append(found["gap"])
        return found

    with suppress(ClientError):  # the framework refuses factors that are not finite
        federate(task, method, local, rounds=trial.links, cohort=1, seed=trial.seed, measure=watch)
    whole = np.full(trial.links + 1, np.inf)
    whole[: len(gaps)] = gaps
    lost = np.flatnonzero(~(whole < DIVERGED))
    if lost.size:
        whole[lost[0] :] = np.inf
    return whole


def trials(size: str, seeds: int) -> list[Trial]:
    """List every path; full training draws nothing, so that one seed says all."""
    return [
        Trial(method, share, links, seed)
        for share, links in LINKS[size].items()
        for method in METHODS
        for seed in range(1 if method == "full" else seeds)
    ]


@dataclass(frozen=True)
class Outcome:
    """A method at a step, over seeds.

    Attributes:
        method: Its name here.
        share: Step over 1 / L.
        seeds: Paths.
        diverged: Paths that left `DIVERGED` behind, or a number that is not finite.
        median: Gap after each link, median over the seeds.
        best: Least final gap of the seeds.
        worst: Greatest.
    """

    method: str
    share: float
    seeds: int
    diverged: int
    median: list[float]
    best: float
    worst: float


def summarise(trials: Sequence[Trial], gaps: Sequence[Array]) -> list[Outcome]:
    """Gather the paths of a method and a step."""
    found = []
    for method, share in dict.fromkeys((t.method, t.share) for t in trials):
        paths = np.stack(
            [g for t, g in zip(trials, gaps, strict=True) if (t.method, t.share) == (method, share)]
        )
        last = paths[:, -1]
        # The one in the middle: a mean of two of which one is infinite would say little.
        median = np.sort(paths, axis=0)[(len(paths) - 1) // 2].tolist()
        lost = int(np.isinf(last).sum())
        ends = float(last.min()), float(last.max())
        found.append(Outcome(method, share, len(paths), lost, median, *ends))
    return found
