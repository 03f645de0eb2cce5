"""Build a run from its config: task, method, evaluation, engine, files and strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from typing_extensions import override

from fedraclora.binding import OWN_GROUPS, object_of, section
from fedraclora.clients.engines import engine_of, in_process
from fedraclora.compatibility import Features, refuse
from fedraclora.config.build import PreparedTask, answering_of, build_task, measured_samples
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import RunConfig
from fedraclora.config.unread import config_parts
from fedraclora.data.partition import spread_clients
from fedraclora.data.task import Task
from fedraclora.devices.system import SystemConfig
from fedraclora.engines.base import Engine
from fedraclora.errors import ConfigError, unknown
from fedraclora.evaluation.choices import measure_of
from fedraclora.evaluation.evaluate import personal_accuracy
from fedraclora.evaluation.metrics import PERSONAL, lower_of
from fedraclora.models.built import InitialWeights
from fedraclora.object_registry import object_digest
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.protocol.method import Draw, Method, Plan, RoundInstructions, first_instructions
from fedraclora.protocol.plan import TrainedPart, trained_of
from fedraclora.protocol.uplinks import SUM_BLOCK
from fedraclora.run.callback import Callback
from fedraclora.run.found_rate import FoundRate
from fedraclora.run.initial import source_of
from fedraclora.run.ledger import BY_CLIENTS
from fedraclora.run.recorder import RunRecorder, resolved_setting
from fedraclora.strategies.server.callbacks import (
    Evaluate,
    Stopping,
    UndefinedMetricsLog,
    own_callbacks,
    unchanged,
)
from fedraclora.strategies.server.loop import LoopConfig, loop_of
from fedraclora.strategies.server.measuring import EvaluationPlan
from fedraclora.strategies.server.round_step import RoundStep, Sizes, step_name, step_of, steps_of
from fedraclora.strategies.start import begin_from
from fedraclora.strategies.steps import round_steps
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.strategies.wrappers import inside, method_of
from fedraclora.training.chunking import ChunkPlan, plan_chunk
from fedraclora.tree import Tree, weights_of

Measure = Callable[[Tree], dict[str, float]]  # kinds of weights


class RunBuilder(TaskBuilder, RoundsBuilder):  # type: ignore[override]
    """Build a run from its config; each part is built once, when it is first read.

    Args:
        config: Checked settings.
        folder: The run folder; None: the run writes no files.
        resume: Whether to resume the run in the folder.
        callbacks: Further callbacks.
        steps: The program's own round steps, which the config names.
        engine: Where clients run; None: as in the config.
        pretrain: Whether to pretrain the model if the config says so.
        probing: Makes the engine of probe rounds, by a name of one to two digits.

    Attributes:
        probed: Names of probe runs so far.
        found: The learning rate of ``local.lr=auto``; None if it is a number or not found yet.
        restartable: Whether the run can begin anew, since it makes its engine itself.
    """

    config: RunConfig

    def __init__(
        self,
        config: RunConfig,
        folder: Path | None = None,
        *,
        resume: bool = False,
        callbacks: Sequence[Callback] = (),
        steps: Sequence[RoundStep] = (),
        engine: Engine | None = None,
        pretrain: bool = True,
        probing: Callable[[str], Engine] = lambda _: in_process(),
    ) -> None:
        TaskBuilder.__init__(self, config, pretrain=pretrain)
        self.folder, self.resume, self.alone = folder, resume, folder is not None
        self.watching, self.given_steps = tuple(callbacks), steps
        self.found: FoundRate | None = None
        self.probing, self.probed = probing, list[str]()
        self.restartable = engine is None
        if engine is not None:
            self.engine = engine

    def begin_anew(self, config: RunConfig, steps: Sequence[RoundStep]) -> None:
        """Close the run and forget its parts, so that they are built for another config.

        Args:
            config: The config.
            steps: The program's own round steps, as new.
        """
        self.close()
        for name in [*vars(self)]:
            if isinstance(getattr(type(self), name, None), cached_property):
                del vars(self)[name]
        self.config, self.given_steps, self.resume = config, steps, False

    @override
    def build(self) -> None:
        for part in ("own_steps", "engine", "plan", "initial_state", "chunk", "trained"):
            getattr(self, part)
        super().build()

    @cached_property
    def own_steps(self) -> list[RoundStep]:
        """Return the user's round steps, in order."""
        return steps_of(self.config.steps, self.given_steps)

    @cached_property
    @override
    def engine(self) -> Engine:  # type: ignore[override]
        """Return the engine, where clients run."""
        return engine_of(self)

    @cached_property
    @override
    def built(self) -> PreparedTask:
        self.fix_bits()
        built = build_task(self.config)
        if not self.resume and (start := begin_from(self.config, built.task.model)):
            info = {**built.task.info, "start": start}
            built = replace(built, task=replace(built.task, info=info))
        return built

    @cached_property
    @override
    def plan(self) -> Plan:
        plan, measuring = super().plan, self.measuring
        if plan.local and not self.built.classes and not (measuring and measuring.alone):
            raise ConfigError(
                "head=personal: the server would need the classes of each client's data to "
                "evaluate, and does not know them. Let only clients evaluate "
                "(evaluate.clients=round, and no data.test_file)"
            )
        return plan

    @cached_property
    @override
    def measuring(self) -> EvaluationPlan | None:
        noisy = isinstance(self.config.privacy, ClientLevel)
        return EvaluationPlan.of(self.config.evaluate, self.task, noisy=noisy)

    @cached_property
    @override
    def method(self) -> Method:  # type: ignore[override]
        """Return the method, with the wrappers of the config."""
        return method_of(self.config, self.task)

    @cached_property
    @override
    def draw(self) -> Draw:
        return Draw(self.config.seed)

    @cached_property
    @override
    def initial_weights(self) -> Tree:
        return weights_of(self.task.model)

    @cached_property
    @override
    def first_instructions(self) -> RoundInstructions:
        sent = first_instructions(self.method, self.initial_state, self.draw, self.built.cohort)
        # Before a step is tried for the size of a chunk.
        weights = InitialWeights(self.initial_weights, (*self.plan.dense, *self.plan.local))
        parts = [*config_parts(self.config), *inside(self.method), weights, sent, sent.program]
        refuse(Features(parts, sent, complete=False).conflicts())
        return sent

    @cached_property
    def chunk(self) -> ChunkPlan:
        """Return the number of clients that train as one batch, and the reason for it."""
        asked = self.config.engine.chunk
        stored = resolved_setting(self.folder, "chunk") if self.resume and self.folder else None
        if self.config.local.train is not None:
            return ChunkPlan(1, "local.train trains one client at a time")
        if asked == "auto" and stored is not None:
            return ChunkPlan(stored, "as it began")  # whatever memory is free now
        engine, first, cohort = self.engine, self.first_instructions, self.built.cohort
        return plan_chunk(
            asked,
            self.trainer,
            self.initial_weights,
            first,
            cohort,
            share=engine.share,
            spread=engine.spread,
            elsewhere=engine.elsewhere,
        )

    @cached_property
    def trained(self) -> TrainedPart:
        """Return the parts of the model that clients train."""
        return trained_of(self.first_instructions, self.plan.shapes)

    @cached_property
    @override
    def loop(self) -> LoopConfig:  # type: ignore[override]
        """Return the settings of the round loop."""
        # Remote hosts are asked for each client separately, so that clients fail separately.
        chunk = 1 if self.engine.elsewhere else self.chunk.chunk
        loop = loop_of(self.config, self.built, chunk, self.trainer.dtype)
        told = self.engine.elsewhere and self.found is not None
        return replace(loop, lr=self.config.local.step_size) if told else loop

    @cached_property
    @override
    def recorder(self) -> RunRecorder:
        config, task = self.config, self.task
        resolved = {"chunk": self.chunk.chunk, "device": self.built.device.type}
        resolved |= {"dtype": self.loop.dtype}
        resolved |= {k: v for k, v in section(task.info, "partition").items() if k == "rows"}
        fixed = {**config.digested, "resolved": resolved | {"summation_block": SUM_BLOCK}}
        return RunRecorder(
            self.folder,
            fixed=fixed | self._code(),
            every=config.output.checkpoint_every,
            sync=config.output.sync,
            chain=config.output.chain,
            store=self.store,
            # The device is in `resolved`, and a run that diverged is resumed at another rate.
            free=("device", "local.lr", *config.free_keys),
            source=None  # weights that no other run uses
            if config.pretrain.epochs or config.init_from is not None
            else source_of(config.model.group, task.head, self.initial_weights),
        )

    def _code(self) -> dict[str, dict[str, str]]:
        """Hash the user's code: objects that the config names, and steps."""
        code = {step_name(step): object_digest(type(step_of(step))) for step in self.own_steps}
        code |= self.config.code
        return {"code": code} if code else {}

    @cached_property
    @override
    def steps(self) -> Sequence[RoundStep]:
        return round_steps(vars(self.config), self.own_steps)

    @cached_property
    @override
    def system(self) -> SystemConfig:
        return self.config.system

    @cached_property
    @override
    def sizes(self) -> Sizes:
        train, device = self.task.train, self.built.device
        return lambda clients: train.sizes(clients.to(device)).cpu()

    @cached_property
    @override
    def examples(self) -> Sizes:
        train, device = self.task.train, self.built.device
        return lambda clients: train.examples(clients.to(device)).cpu()

    @cached_property
    @override
    def callbacks(self) -> Sequence[Callback]:
        return [
            *watching(self.config, self.task, self.measure, self.measuring),
            unchanged({group: getattr(self.config, group) for group in OWN_GROUPS}),
            *self.watching,
        ]

    def measure(self, split: str) -> Measure:
        """Build the function that measures weights: the server's, or clients' with personal parts.

        Metrics of personal models are named ``personal_...``.
        """
        config, built, store = self.config, self.built, self.store
        task, batch, count = built.task, config.evaluate.batch_size, config.evaluate.sample
        samples, local = measured_samples(task, split), self.plan.local

        def own(weights: Tree) -> dict[str, float]:
            owned = {c: self._personal(own) for c, own in store.latest(count).items()}
            if not owned and not local:  # no client has trained yet: all have the server's weights
                owned = {client: {} for client in spread_clients(built.clients, count).tolist()}
            counts = built.label_counts(torch.tensor(list(owned), dtype=torch.int64))
            return personal_accuracy(task.model, weights, owned, samples, counts, batch)

        shared = measure_of(task, samples, batch)

        def each(weights: Tree) -> dict[str, float]:
            owned = store.latest(count).values()
            found = [shared(w) for w in map(self._personal, owned)] or [shared(weights)]
            return {f"{PERSONAL}{n}": sum(f[n] for f in found) / len(found) for n in found[0]}

        stays = local or config.method.client_state
        return (own if built.classes else each) if stays else shared

    def _personal(self, own: Tree) -> Tree:
        """Compute the weights of a client from its stored state."""
        shapes, device = self.plan.shapes, self.built.device
        dense = {n: t.to(device) for n, t in own.items() if n in shapes}
        return self.method.weights(self.strategy.state, self.draw, own) | dense


def watching(
    config: RunConfig,
    task: Task,
    measure: Callable[[str], Measure],
    measuring: EvaluationPlan | None,
) -> list[Callback]:
    """List the callbacks that evaluate a run and may end it early."""
    split, found = config.evaluate.split, list[Callback]()
    samples = measured_samples(task, split)
    found.append(UndefinedMetricsLog(samples.target))
    if len(samples):
        answering = answering_of(config.evaluate, task, samples)
        found.append(Evaluate(measure(split), answering, config.rounds))
    for key in ("choices", "generate"):
        if (asked := getattr(config.evaluate, key)) is not None and not len(samples):
            raise ConfigError(
                f"evaluate.{key}={asked}: the server has no test samples with prompts. Leave "
                "the key out, or set data.test_file"
            )
    if config.stop.patience is not None:
        metric = config.stop.metric
        by_clients = metric.startswith(BY_CLIENTS)
        if by_clients and measuring is None:
            raise ConfigError(
                f"stop.metric={metric}: clients would measure it, but no client evaluates. "
                "Set evaluate.clients=round or all"
            )
        if measuring is not None and not by_clients and task.validation is None:
            raise ConfigError(
                f"stop.metric={metric}: the server measures it on the validation split, but "
                "data.validation=0. Set data.validation above 0, or use a metric of the "
                f"clients, such as clients.{task.metrics[0]}.mean"
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
