"""Runs of our engines on a workload, round by round, and the plain loop they are held against."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.serverapp import Grid

from clients.app import make_client_app
from clients.worker import Worker
from experiments.bench.usage import Laps
from experiments.bench.workloads import LR, Workload
from fedraclora.adapter import make_plan
from fedraclora.chunking import resolve_chunk
from fedraclora.cohort import CohortTrainer
from fedraclora.engines.inprocess import InProcessGrid
from fedraclora.ledger import Ledger
from fedraclora.method import Cohort, Draw, Method
from fedraclora.optimiser import LocalConfig
from fedraclora.replica import Replica
from fedraclora.runbook import RunBook
from fedraclora.task import Task, forward
from fedraclora.tree import Tree
from strategies.base import FedStrategy
from strategies.fed_rac_lora import FedRacLora
from strategies.fedavg import FedAvg
from strategies.loop import LoopConfig

ENDLESS = 1 << 30


@dataclass
class Row:
    """One line of the table, while it runs.

    Attributes:
        round: Runs one more round between ``begin`` and ``end`` of the laps.
        children: Whether other processes work for it.
        weights: The weights after the last round, where they can be compared with a peer's.
        facts: Numbers that do not change from round to round.
        close: Ends what the row started.
    """

    round: Callable[[Laps], None]
    children: bool = False
    weights: Callable[[], Tree] | None = None
    facts: dict[str, float] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


def settle() -> None:
    """Wait until a GPU has done what it was asked; on a CPU there is nothing to wait for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class FederatedRun:
    """A run of one method without evaluation and checkpoints; each round writes its ledger row.

    Args:
        strategy: Drives the rounds.
        grid: Where clients run.
    """

    def __init__(self, strategy: FedStrategy, grid: Grid) -> None:
        self.strategy, self.grid = strategy, grid
        self._laps: Laps | None = None
        self.strategy.on_round = self._end

    def round(self, laps: Laps) -> None:
        """Run one whole round: cohort, messages, training, aggregation, merge, ledger row."""
        if not self.strategy.book.ledger.rows:
            self.strategy.start(self.grid, num_rounds=0)  # writes row 0
        self._laps = laps
        laps.begin()
        self.strategy.start(self.grid, num_rounds=self.strategy.done + 1)

    def _end(self, _: object) -> None:
        # At the ledger row: the rest of `start` is done once a run, not once a round.
        if self._laps is not None:
            settle()
            self._laps.end()
            self._laps = None

    def weights(self) -> Tree:
        """The effective weights after the last round."""
        return self.strategy.method.weights(self.strategy.state, self.strategy.draw)


def federated(
    workload: Workload,
    task: Task,
    device: torch.device,
    *,
    method: Method | None = None,
    chunk: int | str = "auto",
    steps: int | None = None,
) -> Row:
    """Build the row of a method on the in-process engine.

    Args:
        workload: Whose local work is done.
        task: The task of the workload.
        device: Where to train.
        method: Fed-RAC-LoRA of the workload's rank unless given.
        chunk: Clients trained as one batch.
        steps: Local steps, instead of one epoch; 0 leaves the fixed cost of a round.
    """
    dense = isinstance(method, FedAvg)
    plan = make_plan(
        task.model,
        task.head,
        head_policy="adapt",
        bias_policy="average" if dense else "frozen",
    )
    method = FedRacLora(rank=workload.rank) if method is None else method
    base = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    clients = task.train.num_clients
    local = LocalConfig(lr=LR, batch_size=workload.batch, steps=steps, shuffle=False)
    state = method.init(base, plan, Draw(0))
    everyone = Cohort(torch.arange(clients), torch.ones(clients))
    downlink = method.open_round(state, 1, everyone, Draw(0))
    size = resolve_chunk(chunk, task, downlink, local, clients)
    loop = LoopConfig(rounds=ENDLESS, clients=clients, cohort=clients, chunk=size, seed=0)
    replica = Replica(base)
    trainer = CohortTrainer(task, plan, local, seed=0, device=device)
    folder = tempfile.TemporaryDirectory()
    book = RunBook(None, sync=False)  # no folder: no chain, no checkpoints
    book.ledger = Ledger(Path(folder.name) / "ledger.jsonl")
    strategy = FedStrategy(method, state, local, loop, replica=replica, evaluate=None, book=book)
    run = FederatedRun(strategy, InProcessGrid(make_client_app(Worker(trainer, replica))))
    return Row(
        run.round,
        weights=run.weights if dense else None,
        facts={"chunk": float(size)},
        close=folder.cleanup,
    )


class PlainLoop:
    """FedAvg as one writes it by hand: one module, one optimiser per client, a running sum.

    Args:
        workload: Whose local work is done.
        task: The task of the workload.
    """

    def __init__(self, workload: Workload, task: Task) -> None:
        self.workload, self.task = workload, task
        self.state = {n: p.detach().clone() for n, p in task.model.named_parameters()}

    def weights(self) -> Tree:
        """The weights after the last round."""
        return self.state

    def round(self, laps: Laps) -> None:
        """Train every client in turn and average."""
        laps.begin()
        model, data = self.task.model.train(), self.task.train
        sums = {n: torch.zeros_like(t) for n, t in self.state.items()}
        for client in range(data.num_clients):
            model.load_state_dict(self.state)
            optimiser = torch.optim.SGD(model.parameters(), lr=LR)
            places = torch.arange(self.workload.samples).split(self.workload.batch)
            for place in places:
                batch = data.gather(torch.tensor([client]), place[None])
                optimiser.zero_grad()
                F.cross_entropy(forward(model, batch.inputs), batch.target).backward()
                optimiser.step()
            for name, value in model.named_parameters():
                sums[name] += value.detach()
        self.state = {n: t / data.num_clients for n, t in sums.items()}
        laps.end()
