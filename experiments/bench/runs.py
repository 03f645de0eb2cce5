"""Runs of our engines on a workload, round by round."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from fedraclora.clients.engines import in_process, on_ray
from fedraclora.clients.worker import Worker
from fedraclora.clients.worker_state import RequestHandler
from fedraclora.config.build import fix_bits
from fedraclora.config.settings import RayConfig
from fedraclora.experiments.bench.usage import Laps
from fedraclora.experiments.bench.workloads import LR, Case, all_linear_plan
from fedraclora.protocol.method import Draw, Method, RoundInstructions, State, first_instructions
from fedraclora.protocol.quantized import FULL
from fedraclora.run.ledger import Ledger
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg
from fedraclora.strategies.server.callbacks import RowCallback
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.training.chunking import plan_chunk
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.own.trainer import OwnTrainer, Train
from fedraclora.training.precision import FLOAT32
from fedraclora.tree import Tree, weights_of
from fedraclora.weights.replica import Replica

ENDLESS = 1 << 30
RAY_WORKERS = 5  # of all Ray rows of a workload, which are there at the same time
MakeTrainer = Callable[[], CohortTrainer]


@dataclass
class BenchRow:
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
    """Return the settings of a Ray row; on a GPU all rows share one card."""
    return RayConfig(
        workers=workers, gpus=None if device.type == "cpu" else 1 / RAY_WORKERS, address="local"
    )


def settle() -> None:
    """Wait until a GPU has done what it was asked; on a CPU there is nothing to wait for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def lapped(work: Callable[[], None]) -> Callable[[Laps], None]:
    """Make a round of a row from what is done in it."""

    def round_(laps: Laps) -> None:
        laps.begin()
        work()
        settle()
        laps.end()

    return round_


class BenchState(RequestHandler):
    """What a Ray worker holds between rounds.

    Args:
        given: What builds the trainer, where it trains, and the folder where workers leave their
            process ids.
    """

    def __init__(self, given: tuple[MakeTrainer, torch.device, Path]) -> None:
        make_trainer, device, crew = given
        fix_bits(1, device)
        trainer = make_trainer()
        self.replica = Replica(trainer.plan, device)
        super().__init__(Worker(trainer, self.replica))
        (crew / f"{os.getpid()}.pid").touch()


def trainer_maker(
    case: Case,
    method: Method,
    *,
    steps: int | None = None,
    precision: str = FLOAT32,
    own: Train | None = None,
) -> MakeTrainer:
    """Plan a run, and give what builds the trainer of its clients, in this process or in others.

    Args:
        case: A workload on a device.
        method: FedAvg trains biases, too.
        steps: Local steps, instead of one epoch.
        precision: Of the matrix products.
        own: A training function, instead of the project's loop.
    """
    bias = "full" if isinstance(method, FedAvg) else "frozen"
    plan = all_linear_plan(case.task, bias)
    local = LocalConfig(lr=LR, batch_size=case.workload.batch, steps=steps, shuffle=False)
    given = case.task, plan, local
    if own is not None:
        return partial(OwnTrainer, *given, seed=0, device=case.device, function=own, name="own")
    return partial(CohortTrainer, *given, seed=0, device=case.device, precision=precision)


def opened(method: Method, trainer: CohortTrainer, cohort: int) -> tuple[State, RoundInstructions]:
    """Build the state before the first round, and what the cohort is sent in it."""
    state = method.initial_state(weights_of(trainer.task.model), trainer.plan, Draw(0))
    return state, first_instructions(method, state, Draw(0), cohort)


def federated_row(
    case: Case,
    *,
    method: Method | None = None,
    chunk: int | str = "auto",
    steps: int | None = None,
    precision: str = FLOAT32,
    workers: int = 0,
    own: Train | None = None,
    bits: str = FULL,
) -> BenchRow:
    """Build the row of a method: rounds without evaluation and checkpoints, with a ledger.

    Args:
        case: A workload on a device.
        method: Fed-RAC-LoRA of the workload's rank unless given.
        chunk: Clients trained as one batch.
        steps: Local steps, instead of one epoch; 0 leaves the fixed cost of a round.
        precision: Of the matrix products.
        workers: Ray workers that train; 0 trains in this process.
        own: A training function, instead of the project's loop.
        bits: The format of numbers both ways.
    """
    workload, cohort = case.workload, case.workload.cohort
    loops = "peft" in workload.rows and precision == FLOAT32  # a plain loop does the same
    comparable = isinstance(method, FedAvg) or loops
    method = FedRacLora(rank=workload.rank) if method is None else method
    make_trainer = trainer_maker(case, method, steps=steps, precision=precision, own=own)
    trainer, settings = make_trainer(), ray_settings(workers or 1, case.device)
    state, downlink = opened(method, trainer, cohort)
    share = settings.share if workers else None
    size = plan_chunk(chunk, trainer, state.base, downlink, cohort, share=share).chunk
    loop = LoopConfig(rounds=ENDLESS, clients=workload.clients, cohort=cohort, chunk=size, seed=0)
    loop = replace(loop, uplink=bits, downlink=bits)
    folder = tempfile.TemporaryDirectory()
    crew = Path(folder.name)
    recorder = RunRecorder(None, sync=False)  # no folder: no chain, no checkpoints
    recorder.ledger = Ledger(crew / "ledger.jsonl")
    given = make_trainer, case.device, crew
    engine = on_ray(settings, BenchState, given) if workers else in_process()
    given_parts = {"initial_state": state, "recorder": recorder, "alone": case.alone}
    run = RoundsBuilder(method, trainer, loop, engine, **given_parts).ready()

    def round_(laps: Laps) -> None:
        def end(_: object) -> None:
            settle()
            laps.end()

        if not recorder.ledger.rows:
            run.start(0)  # writes row 0
        # At the ledger row: the rest of `start` is done once a run, not once a round.
        run.strategy.callbacks.list[:] = [RowCallback(end)]
        laps.begin()
        run.start(run.strategy.done + 1)

    def close() -> None:
        run.close()
        folder.cleanup()

    return BenchRow(
        round_,
        workers=(lambda: [int(path.stem) for path in crew.glob("*.pid")]) if workers else None,
        weights=run.weights if comparable else None,
        facts={"chunk": float(size)},
        close=close,
    )
