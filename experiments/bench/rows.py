"""The rows of the table that run in this process, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch

from fedraclora.experiments.bench import late
from fedraclora.experiments.bench.central import Central, OwnLoop, PeftLoop, PlainLoop
from fedraclora.experiments.bench.runs import (
    RAY_WORKERS,
    BenchRow,
    federated_row,
    lapped,
    ray_settings,
)
from fedraclora.experiments.bench.usage import Laps, peak, reset_peak
from fedraclora.experiments.bench.workloads import RAY, Case, Workload
from fedraclora.strategies.fedavg import FedAvg
from fedraclora.strategies.fedavg_lora import FedAvgLora
from fedraclora.training.precision import BF16_MIXED, FLOAT32


def loop(case: Case) -> BenchRow:
    """Full weights, by hand."""
    run = PlainLoop(case.workload, replace(case.task, model=case.model))
    return BenchRow(lapped(run.round), weights=lambda: run.state)


def peft(case: Case, precision: str = FLOAT32) -> BenchRow:
    """Fed-RAC-LoRA by hand, on PEFT."""
    run = PeftLoop(case, precision)
    return BenchRow(lapped(run.round), weights=run.weights if precision == FLOAT32 else None)


def checkpointed(case: Case) -> Case:
    """The same, with blocks that are computed again in the backward pass."""
    model = partial(case.workload.model, checkpointing=True)
    return replace(case, workload=replace(case.workload, model=model))


def central(case: Case) -> BenchRow:
    """Central training: in one piece, or in as many as the vectorised engine makes of it.

    Each is tried twice and the faster is kept: which it is depends on the caches.
    """
    engine = federated_row(case)
    chunk = int(engine.facts["chunk"])
    engine.close()
    tried = []
    for at_once in {case.workload.cohort, chunk}:
        limit, laps = Central(case.workload, case.task, at_once), Laps(children=False)
        for _ in range(3):
            lapped(limit.round)(laps)
        seconds = laps.cpu if case.device.type == "cpu" else laps.wall
        tried.append((min(seconds[1:]), at_once))
    at_once = min(tried)[1]
    limit = Central(case.workload, case.task, at_once)
    return BenchRow(lapped(limit.round), facts={"at once": float(at_once)})


def product(case: Case, dtype: torch.dtype) -> BenchRow:
    """One large product of square matrices: the speed that rows are held against."""
    width = 1024 if case.device.type == "cpu" else 8192
    left, right = torch.rand(2, width, width, device=case.device).to(dtype)

    def once() -> None:
        left @ right

    return BenchRow(lapped(once))


def ray(case: Case, workers: int, steps: int | None = None) -> BenchRow:
    """Chunks of clients on resident Ray workers."""
    return federated_row(case, chunk=case.workload.ray_chunk, steps=steps, workers=workers)


@contextmanager
def hosted(rows: Sequence[str], device: torch.device) -> Iterator[None]:
    """Run one Ray cluster with room for the workers of all Ray rows, if there are any.

    On a GPU they share one card, whatever there is.
    """
    if not set(rows) & set(RAY):
        yield
        return
    from fedraclora.engines.ray import Cluster

    cluster = Cluster(ray_settings(RAY_WORKERS, device), device.type)
    try:
        yield
    finally:
        cluster.close()


BUILDERS: dict[str, Callable[[Case], BenchRow]] = {
    "vectorised": federated_row,
    "central": central,
    "bf16": lambda case: federated_row(case, precision=BF16_MIXED),
    "inline": lambda case: federated_row(case, chunk=1),
    "own": lambda case: federated_row(case, chunk=1, own=OwnLoop(case).train),
    "idle": lambda case: federated_row(case, steps=0),
    "fedavg_lora": lambda case: federated_row(case, method=FedAvgLora(rank=case.workload.rank)),
    "fedavg": lambda case: federated_row(case, method=FedAvg()),  # the algorithm of the peers
    "loop": loop,
    "peft": peft,
    "peft bf16": lambda case: peft(case, BF16_MIXED),
    "checkpointing": lambda case: federated_row(checkpointed(case)),
    "peft checkpointing": lambda case: peft(checkpointed(case)),
    "ray idle": lambda case: ray(case, 2, steps=0),
    "ray x1": lambda case: ray(case, 1),
    "ray x2": lambda case: ray(case, 2),
    "cohort 1,000": federated_row,
    "cohort 10,000": lambda case: federated_row(case.of(10_000)),
    "population 1,000": federated_row,
    "population 1,000,000": lambda case: federated_row(case.of(1_000_000)),
    "product": lambda case: product(case, torch.float32),
    "product bf16": lambda case: product(case, torch.bfloat16),
    **late.LATE_BUILDERS,
}


def peak_alone(row: str, workload: Workload) -> int:
    """Run the second round of a row in a process of its own; the peak of its memory, bytes.

    It is forked, so call it before this process holds a model or has computed a gradient.
    """
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(_second_round, row, workload).result()


def _second_round(row: str, workload: Workload) -> int:
    run = BUILDERS[row](Case(workload, torch.device("cpu"), alone=True))
    run.round(Laps(children=False))
    reset_peak()
    run.round(Laps(children=False))
    run.close()
    return peak()
