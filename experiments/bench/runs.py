"""Runs of our engines on a workload, round by round."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from flwr.app import RecordDict

from clients.engines import InProcess, OnRay
from clients.worker import Worker
from experiments.bench.usage import Laps
from experiments.bench.workloads import LR, Workload
from fedraclora.config.build import fix_bits
from fedraclora.config.settings import RayConfig
from fedraclora.data.task import Task
from fedraclora.engines.base import Engine, EngineParts
from fedraclora.protocol.method import Cohort, Downlink, Draw, Method, Plan, State
from fedraclora.protocol.plan import make_plan
from fedraclora.run.ledger import Ledger
from fedraclora.run.recorder import RunRecorder
from fedraclora.training.chunking import plan_chunk
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.precision import FLOAT32
from fedraclora.tree import Tree
from fedraclora.weights.replica import Replica
from strategies.fed_rac_lora import FedRacLora
from strategies.fedavg import FedAvg
from strategies.server.loop import LoopConfig
from strategies.wiring import Wired, wire

ENDLESS = 1 << 30
RAY_WORKERS = 5  # of all Ray rows of a workload, which are there at the same time


@dataclass
class Row:
    """One line of the table, while it runs.

    Attributes:
        round: Runs one more round between ``begin`` and ``end`` of the laps.
        workers: Gives the ids of the processes that work for it; None where there are none.
        weights: The weights after the last round, where they can be compared with a peer's.
        facts: Numbers that do not change from round to round.
        close: Ends what the row started.
    """

    round: Callable[[Laps], None]
    workers: Callable[[], list[int]] | None = None
    weights: Callable[[], Tree] | None = None
    facts: dict[str, float] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


def ray_settings(workers: int, device: torch.device) -> RayConfig:
    """Give the settings of a Ray row; on a GPU all rows share one card."""
    return RayConfig(workers=workers, gpus=None if device.type == "cpu" else 1 / RAY_WORKERS)


def settle() -> None:
    """Wait until a GPU has done what it was asked; on a CPU there is nothing to wait for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class FederatedRun:
    """A run of one method without evaluation and checkpoints; each round writes its ledger row.

    Args:
        run: Ready to start.
    """

    def __init__(self, run: Wired) -> None:
        self.run, self.strategy = run, run.strategy
        self._laps: Laps | None = None
        self.strategy.on_round = self._end

    def round(self, laps: Laps) -> None:
        """Run one whole round: cohort, messages, training, aggregation, merge, ledger row."""
        if not self.strategy.recorder.ledger.rows:
            self.run.start(0)  # writes row 0
        self._laps = laps
        laps.begin()
        self.run.start(self.strategy.done + 1)

    def _end(self, _: object) -> None:
        # At the ledger row: the rest of `start` is done once a run, not once a round.
        if self._laps is not None:
            settle()
            self._laps.end()
            self._laps = None


@dataclass(frozen=True)
class Parts:
    """What trains the clients of a run, in this process or in others.

    Attributes:
        task: Model and data.
        plan: What is adapted, what is trained in full.
        local: Local settings.
        device: Where to train.
        precision: Of the matrix products.
        crew: A folder where workers leave their process ids.
    """

    task: Task
    plan: Plan
    local: LocalConfig
    device: torch.device
    precision: str
    crew: Path | None = None

    @classmethod
    def of(
        cls,
        workload: Workload,
        task: Task,
        device: torch.device,
        method: Method,
        *,
        steps: int | None = None,
        precision: str = FLOAT32,
    ) -> Parts:
        """Plan a run; FedAvg trains biases, too."""
        bias = "average" if isinstance(method, FedAvg) else "frozen"
        plan = make_plan(task.model, task.head, head_policy="adapt", bias_policy=bias)
        local = LocalConfig(lr=LR, batch_size=workload.batch, steps=steps, shuffle=False)
        return cls(task, plan, local, device, precision)

    def state(self, method: Method) -> State:
        """The state before the first round."""
        base = {n: p.detach().clone() for n, p in self.task.model.named_parameters()}
        return method.init(base, self.plan, Draw(0))

    def trainer(self) -> CohortTrainer:
        """Build what trains chunks of clients."""
        return CohortTrainer(
            self.task,
            self.plan,
            self.local,
            seed=0,
            device=self.device,
            precision=self.precision,
        )


class BenchSite:
    """What a Ray worker holds between rounds."""

    def __init__(self, parts: Parts) -> None:
        fix_bits(1, parts.device)
        self.replica = Replica(parts.plan, parts.device)
        self.worker = Worker(parts.trainer(), self.replica)
        if parts.crew is not None:
            (parts.crew / f"{os.getpid()}.pid").touch()

    def train(self, content: RecordDict, kept: Tree) -> tuple[RecordDict, Tree]:
        """Answer a train message; these clients keep nothing."""
        return self.worker.train(content), kept


def first_downlink(method: Method, state: State, cohort: int) -> Downlink:
    """Open the first round."""
    everyone = Cohort(torch.arange(cohort), torch.ones(cohort))
    return method.open_round(state, 1, everyone, Draw(0))


def federated(
    workload: Workload,
    task: Task,
    device: torch.device,
    *,
    method: Method | None = None,
    chunk: int | str = "auto",
    steps: int | None = None,
    precision: str = FLOAT32,
    workers: int = 0,
) -> Row:
    """Build the row of a method.

    Args:
        workload: Whose local work is done.
        task: The task of the workload.
        device: Where to train.
        method: Fed-RAC-LoRA of the workload's rank unless given.
        chunk: Clients trained as one batch.
        steps: Local steps, instead of one epoch; 0 leaves the fixed cost of a round.
        precision: Of the matrix products.
        workers: Ray workers that train; 0 trains in this process.
    """
    method = FedRacLora(rank=workload.rank) if method is None else method
    parts = Parts.of(workload, task, device, method, steps=steps, precision=precision)
    cohort, state, trainer = workload.cohort, parts.state(method), parts.trainer()
    downlink = first_downlink(method, state, cohort)
    share = ray_settings(workers, device).share if workers else None
    size = plan_chunk(chunk, trainer, state.base, downlink, cohort, share=share).chunk
    loop = LoopConfig(rounds=ENDLESS, clients=workload.clients, cohort=cohort, chunk=size, seed=0)
    folder = tempfile.TemporaryDirectory()
    recorder = RunRecorder(None, sync=False)  # no folder: no chain, no checkpoints
    recorder.ledger = Ledger(Path(folder.name) / "ledger.jsonl")
    crew = Path(folder.name)
    engine = make_engine(replace(parts, crew=crew), workers)
    run = wire(
        method, EngineParts.of(trainer, cohort), loop, engine, state=state, recorder=recorder
    )
    rounds = FederatedRun(run)

    def close() -> None:
        run.close()
        folder.cleanup()

    return Row(
        rounds.round,
        workers=(lambda: [int(path.stem) for path in crew.glob("*.pid")]) if workers else None,
        weights=run.weights if isinstance(method, FedAvg) else None,
        facts={"chunk": float(size)},
        close=close,
    )


def make_engine(parts: Parts, workers: int) -> Engine:
    """Make what runs clients: Ray workers, or this process."""
    if not workers:
        return InProcess()
    return OnRay(ray_settings(workers, parts.device), BenchSite, lambda _: parts)
