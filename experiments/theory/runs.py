"""Runs of the framework's own loop whose rows hold what theory speaks of."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clients.app import make_client_app
from clients.worker import Worker
from fedraclora.adapter import make_plan
from fedraclora.engines.inprocess import InProcessGrid
from fedraclora.method import Cohort, Downlink, Draw, Method, Plan
from fedraclora.replica import Replica
from fedraclora.runbook import RunBook
from fedraclora.task import Task
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree
from strategies.base import FedStrategy
from strategies.server.loop import LoopConfig


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

    Returns:
        The strategy, whose ledger has T + 1 rows.
    """
    plan = plan_of(task)
    base = start_of(task)
    clients = task.train.num_clients
    loop = LoopConfig(rounds, clients, cohort, chunk or cohort, seed, weights, "float64")
    replica = Replica(base)
    trainer = CohortTrainer(task, plan, local, seed=seed, device=torch.device("cpu"))
    strategy = FedStrategy(
        method,
        method.init(base, plan, Draw(seed)),
        local,
        loop,
        replica=replica,
        evaluate=measure,
        book=RunBook(None),
    )
    strategy.start(InProcessGrid(make_client_app(Worker(trainer, replica))))
    return strategy


def first_downlink(task: Task, method: Method) -> Downlink:
    """Give what a method sends in round 1, from which the spectrum of E[H] is read."""
    draw = Draw(0)
    state = method.init(start_of(task), plan_of(task), draw)
    return method.open_round(state, 1, Cohort(torch.arange(1), torch.ones(1).double()), draw)


def plan_of(task: Task) -> Plan:
    """Adapt every layer."""
    return make_plan(task.model, task.head, head_policy="adapt", bias_policy="frozen")


def start_of(task: Task) -> Tree:
    """Give W^0."""
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}
