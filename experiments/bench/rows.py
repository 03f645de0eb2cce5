"""The rows of the table that run in this process, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from experiments.bench.central import Central
from experiments.bench.plain import PlainLoop
from experiments.bench.runs import RAY_WORKERS, Row, federated, ray_settings, settle
from experiments.bench.usage import Laps
from experiments.bench.workloads import RAY, Workload
from fedraclora.data.task import Task
from fedraclora.training.precision import BF16_MIXED
from strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Case:
    """A workload on a device; its data are built once, when a row asks for them."""

    workload: Workload
    device: torch.device

    @cached_property
    def task(self) -> Task:
        """The task that the rows share."""
        return self.workload.task(self.device)

    def of(self, clients: int) -> Case:
        """The same with another population."""
        return Case(replace(self.workload, clients=clients), self.device)


def vectorised(case: Case) -> Row:
    """Chunks of clients as one batch: the default engine."""
    return federated(case.workload, case.task, case.device)


def inline(case: Case) -> Row:
    """One client after another, the same engine with chunks of one."""
    return federated(case.workload, case.task, case.device, chunk=1)


def mixed(case: Case) -> Row:
    """The default engine with matrix products in bfloat16."""
    return federated(case.workload, case.task, case.device, precision=BF16_MIXED)


def idle(case: Case) -> Row:
    """Clients that make no step: what a round costs apart from training."""
    return federated(case.workload, case.task, case.device, steps=0)


def fedavg(case: Case) -> Row:
    """Full weights on the default engine: the algorithm of the peers."""
    return federated(case.workload, case.task, case.device, method=FedAvg())


def loop(case: Case) -> Row:
    """Full weights, by hand."""
    run = PlainLoop(case.workload, replace(case.task, model=copy.deepcopy(case.task.model)))
    return Row(run.round, weights=run.weights)


def central(case: Case) -> Row:
    """The physical limit: in one piece, or in as many as the vectorised engine makes of it.

    Each is tried twice and the faster is kept: which it is depends on the caches.
    """
    engine = vectorised(case)
    chunk = int(engine.facts["chunk"])
    engine.close()
    tried = []
    for at_once in {case.workload.cohort, chunk}:
        limit, laps = Central(case.workload, case.task, at_once), Laps(children=False)
        for _ in range(3):
            laps.begin()
            limit.round()
            settle()
            laps.end()
        seconds = laps.cpu if case.device.type == "cpu" else laps.wall
        tried.append((min(seconds[1:]), at_once))
    at_once = min(tried)[1]
    limit = Central(case.workload, case.task, at_once)

    def round_(laps: Laps) -> None:
        laps.begin()
        limit.round()
        settle()
        laps.end()

    return Row(round_, facts={"at once": float(at_once)})


def ray(case: Case, workers: int, steps: int | None = None) -> Row:
    """Chunks of clients on resident Ray workers."""
    chunk = case.workload.ray_chunk
    return federated(
        case.workload, case.task, case.device, chunk=chunk, steps=steps, workers=workers
    )


@contextmanager
def hosted(rows: Sequence[str], device: torch.device) -> Iterator[None]:
    """Hold one Ray cluster with room for the workers of all Ray rows, if there are any.

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


BUILDERS: dict[str, Callable[[Case], Row]] = {
    "vectorised": vectorised,
    "central": central,
    "bf16": mixed,
    "inline": inline,
    "idle": idle,
    "fedavg": fedavg,
    "loop": loop,
    "ray idle": lambda case: ray(case, 2, steps=0),
    "ray x1": lambda case: ray(case, 1),
    "ray x2": lambda case: ray(case, 2),
    "cohort 1,000": vectorised,
    "cohort 10,000": lambda case: vectorised(case.of(10_000)),
    "population 1,000": vectorised,
    "population 1,000,000": lambda case: vectorised(case.of(1_000_000)),
}
