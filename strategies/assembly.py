"""Puts a run together from its config: task, method, what is measured, and the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedraclora.binding import OWN_GROUPS, object_of, section
from fedraclora.config.build import (
    BuiltTask,
    answering_of,
    build_task,
    fix_bits,
    measured_samples,
    pick_device,
    plan_of,
    terms_of,
    trainer_of,
)
from fedraclora.config.run_config import RunConfig
from fedraclora.data.partition import spread_clients
from fedraclora.data.samples import count_examples
from fedraclora.data.task import Task
from fedraclora.engines.base import EngineParts, MakeEngine
from fedraclora.errors import ConfigError, unknown
from fedraclora.evaluation.choices import measure_of
from fedraclora.evaluation.evaluate import personal_accuracy
from fedraclora.evaluation.metrics import PERSONAL, lower_of
from fedraclora.objects import code_digests, object_digest
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.protocol.method import Cohort, Draw, Plan
from fedraclora.protocol.plan import trained_of
from fedraclora.protocol.uplinks import SUM_BLOCK
from fedraclora.run.callback import Callback
from fedraclora.run.client_state import ClientStore
from fedraclora.run.digests import free_keys
from fedraclora.run.initial import source_of
from fedraclora.run.ledger import BY_CLIENTS
from fedraclora.run.recorder import RunRecorder, resolved
from fedraclora.strategies.server.callbacks import (
    Evaluate,
    Stopping,
    Undefined,
    own_callbacks,
    unchanged,
)
from fedraclora.strategies.server.loop import loop_of
from fedraclora.strategies.server.measuring import Measuring
from fedraclora.strategies.server.round_step import RoundStep, step_name, step_of, steps_of
from fedraclora.strategies.start import begin_from
from fedraclora.strategies.steps import round_steps
from fedraclora.strategies.wiring import Wired, wire
from fedraclora.strategies.wrappers import method_of
from fedraclora.training.chunking import ChunkPlan, plan_chunk
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.precision import check_base
from fedraclora.tree import Tree, weights_of

Measure = Callable[[Tree], dict[str, float]]  # of weights


@dataclass(frozen=True)
class Assembled(Wired):
    """A run of a config that is ready to start.

    Attributes:
        config: Its settings.
        built: Task and sizes.
        plan: Which weights are trained how.
        trainer: Trains chunks of clients in this process.
        chunk: Clients that train as one batch, and why so many.
        trained: What clients train of the model, in words.
    """

    config: RunConfig
    built: BuiltTask
    plan: Plan
    trainer: CohortTrainer
    chunk: ChunkPlan
    trained: str


def assemble_with(
    config: RunConfig,
    folder: Path | None,
    *,
    engine_of: MakeEngine,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    steps: Sequence[RoundStep] = (),
) -> Assembled:
    """Build every part of a run.

    Args:
        config: Checked settings.
        folder: The run folder, which exists; None keeps the ledger in memory.
        engine_of: Makes the engine.
        resume: Go on from the folder's checkpoint.
        callbacks: What else watches the rounds, or ends them early.
        steps: Those of a program's own, which the config names.

    Returns:
        The parts; whoever has them closes them.

    Raises:
        FedRacLoraError: Whatever is wrong with the config, the data or the engine.
    """
    steps = steps_of(config.steps, steps)
    with ExitStack() as failed:
        engine = engine_of(config)
        failed.callback(engine.close)
        fix_bits(config.engine.threads, pick_device(config.device))
        built = build_task(config)
        if not resume and (start := begin_from(config, built.task.model)):
            info = {**built.task.info, "start": start}
            built = replace(built, task=replace(built.task, info=info))
        plan = plan_of(config, built.task)
        measuring = Measuring.of(
            config.evaluate, built.task, noisy=isinstance(config.privacy, ClientLevel)
        )
        if plan.local and not built.classes and not (measuring and measuring.alone):
            raise ConfigError(
                "head is personal, which the server measures by class, but it knows no classes "
                "of the "
                "clients' data: let clients measure alone (evaluate.clients=round, and no "
                "data.test_file)"
            )
        base = weights_of(built.task.model)
        draw = Draw(config.seed)
        method = method_of(config, built.task)
        name = config.chosen("method")
        state, server = method.initial_state(base, plan, draw), config.server_optimiser
        first = Cohort(torch.arange(built.cohort), torch.ones(built.cohort))
        downlink = method.open_round(state, 1, first, draw)
        moved = any(state.base[name] is not weight for name, weight in base.items())
        begins = moved or not downlink.program.trains
        changes = {
            f"method={name} merges each update into the weights": method.traits.merges,
            "dora=true rescales the weights": config.dora,
            f"method={name} takes its first factors out of the weights": begins,
            f"server_optimiser={server.name} with space=weights steps in the weights":
                server.name != "none" and server.space == "weights",
        }  # fmt: skip
        check_base(base, (*plan.dense, *plan.local), changes)
        trainer = trainer_of(config, built, plan)
        stored = resolved(folder, "chunk") if resume and folder is not None else None
        where: dict[str, Any] = {k: getattr(engine, k) for k in ("share", "spread", "elsewhere")}
        chunk = (
            ChunkPlan(1, "local.train trains one client at a time")
            if config.local.train is not None
            else ChunkPlan(stored, "as it began")  # whatever memory is free now
            if config.engine.chunk == "auto" and stored is not None
            else plan_chunk(config.engine.chunk, trainer, base, downlink, built.cohort, **where)
        )
        # Hosts of others are asked for each client by itself: so one fails alone.
        loop = loop_of(config, built, 1 if engine.elsewhere else chunk.chunk, trainer.dtype)
        came = {"chunk": chunk.chunk, "device": built.device.type, "dtype": loop.dtype}
        came |= {k: v for k, v in section(built.task.info, "partition").items() if k == "rows"}
        store, output = ClientStore(), config.output
        recorder = RunRecorder(
            folder,
            fixed={**config.digested, "resolved": came | {"summation_block": SUM_BLOCK}}
            | code_of(config, steps),
            every=output.checkpoint_every,
            sync=output.sync,
            chain=output.chain,
            store=store,
            free=("device", *free_keys(config.plain)),  # what the device came to is in `resolved`
            source=None  # of weights that nobody else has
            if config.pretrain.epochs or config.init_from is not None
            else source_of(config.model, built.task.head, base),
        )

        def personal(own: Tree) -> Tree:
            """Compute the weights of a client from its stored state."""
            dense = {n: t.to(base[n].device) for n, t in own.items() if n in base}
            return method.weights(wired.strategy.state, draw, own) | dense

        measure = partial(measurement, config, built, plan, store, personal)
        wired = wire(
            method,
            EngineParts(built, trainer, store, terms_of(config, built)),
            loop,
            engine,
            state=state,
            recorder=recorder,
            resume=resume,
            steps=round_steps(vars(config), steps),
            system=config.system,
            sizes=lambda clients: built.task.train.sizes(clients.to(built.device)).cpu(),
            examples=lambda clients: count_examples(
                built.task.train, clients.to(built.device)
            ).cpu(),
            callbacks=[
                *watching(config, built.task, measure, measuring),
                unchanged({group: getattr(config, group) for group in OWN_GROUPS}),
                *callbacks,
            ],
            measuring=measuring,
            alone=folder is not None,  # else exports of the run ask for its first weights
        )
        failed.pop_all()
    return Assembled(
        **vars(wired),
        config=config,
        built=built,
        plan=plan,
        trainer=trainer,
        chunk=chunk,
        trained=trained_of(downlink, plan.shapes),
    )


def watching(
    config: RunConfig,
    task: Task,
    measure: Callable[[str], Measure],
    measuring: Measuring | None = None,
) -> list[Callback]:
    """List what measures the weights of a run, and may end it early by that."""
    split, found = config.evaluate.split, list[Callback]()
    samples = measured_samples(task, split)
    found.append(Undefined(samples.target))
    if len(samples):
        answering = answering_of(config.evaluate, task, samples)
        found.append(Evaluate(measure(split), answering, config.rounds))
    for key in ("choices", "generate"):
        if (asked := getattr(config.evaluate, key)) is not None and not len(samples):
            raise ConfigError(
                f"evaluate.{key} is {asked}, but the server has no test samples with prompts: "
                "leave it out, or give it some (data.test_file)"
            )
    if config.stop.patience is not None:
        metric = config.stop.metric
        by_clients = metric.startswith(BY_CLIENTS)
        if by_clients and measuring is None:
            raise ConfigError(
                f"stop.metric is {metric}, which clients measure, but none does: set "
                "evaluate.clients=round or all"
            )
        if measuring is not None and not by_clients and task.validation is None:
            raise ConfigError(
                f"stop.metric is {metric}, which the server measures on the validation split, but "
                "data.validation is 0: set it above 0, or take a metric of the clients, such as "
                f"clients.{task.metrics[0]}.mean"
            )
        known = measuring.named if by_clients and measuring else task.measured
        if (metric if by_clients else metric.removeprefix(PERSONAL)) not in {*known, "gap"}:
            raise unknown("stop.metric of these data", metric, known)
        validated = None if by_clients else measure("validation")
        found.append(Stopping(config.stop, validated, lower_of(task.info)))
    named = [
        object_of(f"callbacks[{k}]", it, Callback, called=True)
        for k, it in enumerate(config.callbacks)
    ]
    return [*found, *own_callbacks("callbacks", named)]


def code_of(config: RunConfig, steps: Sequence[RoundStep]) -> dict[str, dict[str, str]]:
    """Hash the code that a user has brought: of what the config names, and of the steps."""
    code = {step_name(step): object_digest(type(step_of(step))) for step in steps}
    code |= code_digests(config.plain)
    return {"code": code} if code else {}


def measurement(
    config: RunConfig,
    built: BuiltTask,
    plan: Plan,
    store: ClientStore,
    personal: Callable[[Tree], Tree],
    split: str,
) -> Measure:
    """Build the function that measures weights: on the server, or on clients if a part stays there.

    The figures of clients' own models have names of their own, ``personal_...``.
    """
    task, batch, count = built.task, config.evaluate.batch_size, config.evaluate.sample
    samples = measured_samples(task, split)

    def own(weights: Tree) -> dict[str, float]:
        owned = {c: personal(own) for c, own in store.latest(count).items()}
        if not owned and not plan.local:  # nobody has trained yet: all have the server's
            owned = {client: {} for client in spread_clients(built.clients, count).tolist()}
        counts = built.label_counts(torch.tensor(list(owned), dtype=torch.int64))
        return personal_accuracy(task.model, weights, owned, samples, counts, batch)

    shared = measure_of(task, samples, batch)

    def each(weights: Tree) -> dict[str, float]:
        owned = store.latest(count).values()
        found = [shared(w) for w in map(personal, owned)] or [shared(weights)]
        return {f"{PERSONAL}{n}": sum(f[n] for f in found) / len(found) for n in found[0]}

    stays = plan.local or config.method.client_state
    return (own if built.classes else each) if stays else shared
