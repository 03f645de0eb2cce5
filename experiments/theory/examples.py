"""Two 3 x 3 examples: LoRA, and a basis of noisy links, need not find what is there.

The counter-example is that of arXiv 2410.08305, section 3, where LoRA stays beside what full
training finds. ``f(W) = vec(W)^T M vec(W) + b^T vec(W)`` with M = diag(10, 1, ..., 1) and b = 1, so
L = 20, at rank 1. The paper's b, start, initialization and chain length are not known; here W^0 =
0, LoRA's A has N(0, 1) entries, B = 0, and a chain has a link every `CHAIN` steps.

In the other a basis taken from noisy links alone does not find what a drawn one finds:
``f(W) = (w_22^2 + w_33^2) / 2`` with the stochastic gradient ``grad f(W) + xi SIGMA e_1 e_1^T``,
where xi is 1 or -1 with equal chances: L = 1, from W^0 = diag(0, 1, 1), one step of SGD a link.
While |w_ii| < SIGMA each link turns the kept direction towards e_1, where there is noise and
nothing to learn (docs/records/theory.md, section 9). After GoLore (He et al., arXiv 2410.11289),
which shows the like for singular vectors of stochastic gradients.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from typing_extensions import override

from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ClientError
from fedraclora.experiments.theory.problems import federate
from fedraclora.object_registry import register_object
from fedraclora.protocol.method import Method
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.strategies.methods.subspace_rac_lora import SubspaceRacLora
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree

Array = npt.NDArray[np.float64]

SIZE = 3
M = torch.ones(SIZE, SIZE, dtype=torch.float64)  # its diagonal, by entry of W
M[0, 0] = 10
CHAIN = 20  # steps of a link, and of a round here
SIGMA = 2.0
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


def quadratic() -> Task:
    """Write f as a regression: sample j sees column j of W, the loss is a mean over samples.

    ``(1/3) 1/2 (c w - y)^2 = M w^2 + w + const`` for ``c = sqrt(6 M)`` and ``y = -3 / c``.
    """
    scales = (2 * SIZE * M).sqrt().mT
    x = torch.cat([torch.eye(SIZE, dtype=torch.float64), scales], dim=1)
    samples = Samples({"x": x}, -SIZE / scales)
    data = PartitionedData.of(samples, [np.arange(SIZE)])
    return Task(Weighted().double(), (), "squared_error", ("loss",), data, samples)


def from_optimum(weights: Tree) -> dict[str, float]:
    """Compute the gap ``sum M (w - w*)^2``, w* = -1 / (2 M)."""
    return {"gap": float((M * (weights["fc1.weight"] + 1 / (2 * M)) ** 2).sum())}


def basis(rank: int, fresh: float, *, pairs: bool = False) -> SubspaceRacLora:
    """Build the method with links of one round and rows of one length."""
    return SubspaceRacLora(rank, float(rank), False, True, "singular", 1, fresh, pairs, 1.0)


def loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``(w_22^2 + w_33^2) / 2 + y w_11`` of each sample [N], and the counts.

    Args:
        output: W^T for each sample, the images of unit vectors, [N, 3, 3].
        target: y, [N].
    """
    w = output.diagonal(dim1=1, dim2=2)
    half = w[:, 1:].square().sum(dim=1) / 2
    return half + target * w[:, 0], torch.ones(len(w), dtype=torch.int64)


def noisy() -> Task:
    """Build the two samples, y = SIGMA and -SIGMA; a step sees one of them."""
    x = torch.eye(SIZE, dtype=torch.float64).expand(2, -1, -1)
    samples = Samples({"x": x}, torch.tensor([SIGMA, -SIGMA], dtype=torch.float64))
    data = PartitionedData.of(samples, [np.arange(2)])
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight.data = torch.diag(torch.tensor([0.0] + [1.0] * (SIZE - 1)))
    model = nn.Sequential(OrderedDict(fc1=layer)).double()
    return Task(model, (), register_object(loss), ("loss",), data, samples)


def beside_noise(weights: Tree) -> dict[str, float]:
    """Compute f(W), whose least value is 0."""
    return {"gap": float(weights["fc1.weight"].diagonal()[1:].square().sum() / 2)}


@dataclass(frozen=True)
class Example:
    """What an example runs.

    Attributes:
        task: Builds its one client.
        measure: The gap of weights.
        smoothness: L.
        local: Steps of a link, beside their size.
        links: Numbers of links, by size, by step over 1 / L.
        methods: By their names here.
    """

    task: Callable[[], Task]
    measure: Callable[[Tree], dict[str, float]]
    smoothness: float
    local: Mapping[str, int | bool]
    links: Mapping[str, Mapping[float, int]]
    methods: Mapping[str, Method]


EXAMPLES = {
    "counter-example": Example(
        quadratic,
        from_optimum,
        smoothness=20.0,
        local={"batch_size": 0, "steps": CHAIN, "shuffle": False},
        links={"full": {1.0: 30, 0.1: 60}, "small": {1.0: 2, 0.1: 2}},
        methods={
            "full": FedAvg(),
            "LoRA": FedAvgLora(rank=1, alpha=1.0, init="gaussian"),
            "COLA": FedAvgLora(rank=1, alpha=1.0, init="gaussian", merge_every=1),
            "asymmetric LoRA": FedRacLora(rank=1, alpha=1.0, merge_every=None),
            "RAC-LoRA": FedRacLora(rank=1, alpha=1.0),
        },
    ),
    "a noisy basis": Example(
        noisy,
        beside_noise,
        smoothness=1.0,
        local={"batch_size": 1, "steps": 1},
        links={"full": {0.5: 100}, "small": {0.5: 2}},
        methods={
            "kept, r = 1": basis(1, 0.0),
            "pairs, r = 1": basis(1, 0.0, pairs=True),
            "drawn, r = 1": basis(1, 1.0),
            "half kept, r = 2": basis(2, 0.5),
            "drawn, r = 2": basis(2, 1.0),
        },
    ),
}


@dataclass(frozen=True)
class Trial:
    """One path: an example, its method, a step over 1 / L, a number of links, a seed."""

    example: str
    method: str
    share: float
    links: int
    seed: int


def run_trial(trial: Trial) -> Array:
    """Run the method, and return the gap after each link; infinite from where the path diverged."""
    example, gaps = EXAMPLES[trial.example], list[float]()
    local = LocalConfig(lr=trial.share / example.smoothness, **example.local)  # type: ignore[arg-type]
    task, method, seed = example.task(), example.methods[trial.method], trial.seed

    def watch(weights: Tree) -> dict[str, float]:
        found = example.measure(weights)
        gaps.append(found["gap"])
        return found

    with suppress(ClientError):  # the framework refuses factors that are not finite
        federate(task, method, local, rounds=trial.links, cohort=1, seed=seed, measure=watch)
    whole = np.full(trial.links + 1, np.inf)
    whole[: len(gaps)] = gaps
    lost = np.flatnonzero(~(whole < DIVERGED))
    if lost.size:
        whole[lost[0] :] = np.inf
    return whole


def trials(example: str, size: str, seeds: int) -> list[Trial]:
    """List every path; full training draws nothing, so that one seed says all."""
    return [
        Trial(example, method, share, links, seed)
        for share, links in EXAMPLES[example].links[size].items()
        for method in EXAMPLES[example].methods
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


def outcomes_of(trials: Sequence[Trial], gaps: Sequence[Array]) -> list[Outcome]:
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
