"""Puts a run together: task, method, workers, grid and the one strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from clients.app import make_client_app
from clients.site import Site, SiteParts
from clients.worker import Worker
from fedraclora.aggregate import SUM_BLOCK
from fedraclora.aggregator import AGGREGATORS
from fedraclora.build import BuiltTask, build_task, fix_bits, measured_samples, plan_of, trainer_of
from fedraclora.chunking import resolve_chunk
from fedraclora.clientstore import ClientStore
from fedraclora.config import RunConfig
from fedraclora.engines.inprocess import InProcessGrid
from fedraclora.engines.local import LocalGrid
from fedraclora.errors import ConfigError
from fedraclora.evaluate import evaluate
from fedraclora.method import Cohort, Draw, Plan
from fedraclora.personal import personal_accuracy
from fedraclora.replica import Chronicle, Replica
from fedraclora.runbook import RunBook
from fedraclora.settings import RayConfig
from fedraclora.tree import Tree
from strategies.base import FedStrategy
from strategies.fleet import Fleet
from strategies.loop import LoopConfig
from strategies.rows import Row


@dataclass(frozen=True)
class Assembled:
    """A run that is ready to start: ``strategy.start(grid)``."""

    config: RunConfig
    built: BuiltTask
    plan: Plan
    strategy: FedStrategy
    grid: LocalGrid
    chunk: int


def assemble(
    config: RunConfig,
    folder: Path | None,
    *,
    resume: bool = False,
    on_round: Callable[[Row], None] | None = None,
) -> Assembled:
    """Build every part of a run.

    Args:
        config: Checked settings.
        folder: The run folder, which exists; None keeps the ledger in memory.
        resume: Go on from the folder's checkpoint.
        on_round: Called with each new ledger row.

    Returns:
        The parts.
    """
    fix_bits(config.engine.threads)
    built = build_task(config)
    task = built.task
    plan = plan_of(config, task)
    if plan.local and not built.classes:
        raise ConfigError("head is local, which is measured by class, but the data have no classes")
    base = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    draw = Draw(config.seed)
    state = config.method.init(base, plan, draw)
    first = Cohort(torch.arange(built.cohort), torch.ones(built.cohort))
    downlink = config.method.open_round(state, 1, first, draw)
    chunk = (
        1
        if config.engine.name == "inline"
        else resolve_chunk(config.engine.chunk, task, downlink, config.local, built.cohort)
    )
    loop = LoopConfig(
        rounds=config.rounds,
        clients=built.clients,
        cohort=built.cohort,
        chunk=chunk,
        seed=config.seed,
        weights=config.weights,
        dtype=str(next(iter(base.values())).dtype).removeprefix("torch."),
        evaluate_every=config.evaluate.every,
        max_failures=config.max_failures,
    )
    resolved = {"chunk": chunk, "device": built.device.type, "dtype": loop.dtype}
    resolved["summation_block"] = SUM_BLOCK
    fixed = {**config.digested, "resolved": resolved}
    store = ClientStore()
    book = RunBook(
        folder,
        fixed=fixed,
        every=config.output.checkpoint_every,
        sync=config.output.sync,
        chain=config.output.chain,
        store=store,
    )
    samples = measured_samples(task, config.evaluate.split)

    def measure(weights: Tree) -> dict[str, float]:
        if plan.local:
            owned = store.latest(config.evaluate.clients)
            counts = built.label_counts(torch.tensor(list(owned), dtype=torch.int64))
            return personal_accuracy(
                task.model, weights, owned, samples, counts, config.evaluate.batch_size
            )
        found = evaluate(
            task.model, weights, samples, task.loss, task.metrics, config.evaluate.batch_size
        )
        if task.optimum is not None and "loss" in found:
            found["gap"] = found["loss"] - task.optimum
        return found

    replica = Chronicle() if isinstance(config.engine, RayConfig) else Replica(base)
    strategy = FedStrategy(
        config.method,
        state,
        config.local,
        loop,
        replica=replica,
        evaluate=measure,
        book=book,
        aggregator=AGGREGATORS[config.aggregator],
        on_round=on_round,
        sizes=lambda clients: task.train.sizes(clients.to(built.device)).cpu(),
        fleet=Fleet(config.system, config.seed, config.local),
    )
    if resume:
        restored, done = book.restore(state, strategy.catch_up)
        strategy.resume(restored, done)
    grid = make_grid(config, built, plan, replica, store)
    return Assembled(config, built, plan, strategy, grid, chunk)


def make_grid(
    config: RunConfig, built: BuiltTask, plan: Plan, replica: Replica, store: ClientStore
) -> LocalGrid:
    """Start what runs clients.

    Raises:
        FedRacLoraError: If it does not start, or there is less than is asked for.
    """
    if isinstance(replica, Chronicle) and isinstance(config.engine, RayConfig):
        from fedraclora.engines.ray import Cluster, RayGrid

        return RayGrid(
            Cluster(config.engine, built.device.type),
            Site,
            SiteParts(config, built, plan),
            chronicle=replica,
            store=store,
            settings=config.engine,
        )
    worker = Worker(trainer_of(config, built, plan), replica, store)
    return InProcessGrid(make_client_app(worker))
