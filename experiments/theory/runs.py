"""Runs of the framework's own loop whose rows hold what theory speaks of."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedraclora.clients.engines import InProcess
from fedraclora.data.task import Task
from fedraclora.engines.base import EngineParts
from fedraclora.protocol.method import Cohort, Downlink, Draw, Method, Plan
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.quantised import FULL
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.server.callbacks import Evaluate
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.wiring import wire
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
    run = wire(method, EngineParts.of(trainer, cohort), loop, InProcess(), callbacks=callbacks)
    run.start()
    return run.strategy


def first_downlink(task: Task, method: Method) -> Downlink:
    """Build what a method sends in round 1, from which the spectrum of E[H] is read."""
    draw = Draw(0)
    state = method.init(start_of(task), plan_of(task), draw)
    return method.open_round(state, 1, Cohort(torch.arange(1), torch.ones(1).double()), draw)


def plan_of(task: Task) -> Plan:
    """Adapt every layer."""
    return make_plan(task.model, task.head, head_policy="adapt", bias_policy="frozen")


def start_of(task: Task) -> Tree:
    """Return the base weights W^0."""
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}
