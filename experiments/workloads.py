"""The workloads of the benchmark: random data, three models, one method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from clients.app import make_client_app
from clients.worker import Worker
from fedraclora.adapter import make_plan
from fedraclora.chunking import resolve_chunk
from fedraclora.cohort import CohortTrainer
from fedraclora.engines.inprocess import InProcessGrid
from fedraclora.method import Cohort, Draw
from fedraclora.models import MODELS
from fedraclora.optimiser import LocalConfig
from fedraclora.replica import Replica
from fedraclora.rng import generator
from fedraclora.runbook import RunBook
from fedraclora.samples import Partitioned, Samples
from fedraclora.task import Task
from strategies.base import FedStrategy
from strategies.fed_rac_lora import FedRacLora
from strategies.loop import LoopConfig


@dataclass(frozen=True)
class Workload:
    """One model with the local work of each client.

    Attributes:
        model: Builds the network.
        inputs: Builds inputs for a number of samples.
        classes: Outputs.
        head: Name of the final layer.
        rank: Of every adapter.
        batch: Samples of a step.
        steps: Local steps.
        inline: Whether to time clients one after another, too.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, torch.Tensor]]
    classes: int
    head: str
    rank: int
    batch: int
    steps: int = 5
    inline: bool = True

    def task(self, clients: int, device: torch.device) -> Task:
        """Build the task: as many samples per client as the steps of a round use."""
        each = self.batch * (self.steps or 1)
        count = clients * each
        target = torch.from_numpy(generator(0, "bench", "y").integers(0, self.classes, count))
        samples = Samples(self.inputs(count), target)
        parts = [np.arange(k * each, (k + 1) * each) for k in range(clients)]
        data = Partitioned.of(samples, parts).to(device)
        model = self.model().to(device)
        few = samples.take(torch.arange(2)).to(device)
        return Task(model, (self.head,), "cross_entropy", ("accuracy",), data, few)


@dataclass
class Runner:
    """A strategy that runs one more round at each call."""

    strategy: FedStrategy
    grid: InProcessGrid

    def round(self) -> None:
        """Run one whole round: cohort, messages, training, aggregation, merge, ledger row."""
        self.strategy.start(self.grid, num_rounds=self.strategy.done + 1)


def make_runner(
    workload: Workload, task: Task, device: torch.device, *, chunk: int | str = "auto"
) -> Runner:
    """Build a run of Fed-RAC-LoRA over all clients, without evaluation and without files."""
    plan = make_plan(task.model, task.head, head_policy="adapt")
    base = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    clients = task.train.num_clients
    method = FedRacLora(rank=workload.rank)
    local = LocalConfig(lr=0.1, batch_size=workload.batch, steps=workload.steps)
    state = method.init(base, plan, Draw(0))
    everyone = Cohort(torch.arange(clients), torch.ones(clients))
    downlink = method.open_round(state, 1, everyone, Draw(0))
    size = resolve_chunk(chunk, task, downlink, local, clients)
    loop = LoopConfig(rounds=1 << 30, clients=clients, cohort=clients, chunk=size, seed=0)
    replica = Replica(base)
    trainer = CohortTrainer(task, plan, local, seed=0, device=device)
    strategy = FedStrategy(
        method, state, local, loop, replica=replica, evaluate=None, book=RunBook(None)
    )
    return Runner(strategy, InProcessGrid(make_client_app(Worker(trainer, replica))))


def _vectors(width: int) -> Callable[[int], dict[str, torch.Tensor]]:
    def make(count: int) -> dict[str, torch.Tensor]:
        x = generator(0, "bench", "x").standard_normal((count, width), dtype=np.float32)
        return {"x": torch.from_numpy(x)}

    return make


def _tokens(vocabulary: int, length: int) -> Callable[[int], dict[str, torch.Tensor]]:
    def make(count: int) -> dict[str, torch.Tensor]:
        drawn = generator(0, "bench", "ids").integers(0, vocabulary, (count, length))
        ids = torch.from_numpy(drawn)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return make


def _mlp(width: int, hidden: int, classes: int) -> Callable[[], nn.Module]:
    return lambda: MODELS["mlp"](shape=(width,), classes=classes, seed=0, hidden=[hidden]).model


def _transformer() -> nn.Module:
    return MODELS["transformer"](
        shape=(),
        classes=2,
        seed=0,
        hidden=384,
        layers=6,
        heads=12,
        intermediate=1536,
        vocab=1000,
        max_length=32,
    ).model


WORKLOADS = {
    "small": Workload(_mlp(64, 128, 10), _vectors(64), 10, "fc2", rank=4, batch=10),
    "mlp": Workload(_mlp(784, 1000, 100), _vectors(784), 100, "fc2", rank=8, batch=32),
    "transformer": Workload(
        _transformer, _tokens(1000, 32), 2, "classifier", rank=8, batch=4, inline=False
    ),
}
