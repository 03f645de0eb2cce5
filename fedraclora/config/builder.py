"""Build the parts of a run that every training process needs: task, plan, trainer, terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from typing_extensions import override

from fedraclora.config.build import (
    PreparedTask,
    build_task,
    fix_bits,
    pick_device,
    plan_of,
    terms_of,
    trainer_of,
)
from fedraclora.config.run_config import TaskConfig
from fedraclora.config.settings import PretrainConfig
from fedraclora.data.task import Task
from fedraclora.object_registry import register_object
from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.protocol.method import Plan
from fedraclora.protocol.named import RegisteredByName, of_main
from fedraclora.training.cohort import CohortTrainer
from fedraclora.trust import trust, trusted


class TaskBuilder:
    """Build a task and its trainer; each part is built once, when it is first used.

    A server, its workers and nodes build the same parts from the same config. A pickled builder
    includes task and plan, with the program's objects and trusted modules; the other process builds
    its own trainer.

    Args:
        config: Checked settings.
        pretrain: Whether to pretrain the model; not if its weights come from elsewhere.

    Raises:
        FedRacLoraError: When a part is read, if data, partition or model are wrong.
    """

    def __init__(self, config: TaskConfig, *, pretrain: bool = True) -> None:
        self.config = config if pretrain else replace(config, pretrain=PretrainConfig())

    @cached_property
    def built(self) -> PreparedTask:
        """Return the task with its sizes."""
        return build_task(self.config)

    @property
    def task(self) -> Task:
        """Return model and data, on their device."""
        return self.built.task

    @cached_property
    def plan(self) -> Plan:
        """Return which weights are adapted, and which are trained in full."""
        return plan_of(self.config, self.task)

    @cached_property
    def trainer(self) -> CohortTrainer:
        """Return the trainer of this process's clients."""
        return trainer_of(self.config, self.built, self.plan)

    @cached_property
    def terms(self) -> SecAggTerms | None:
        """Return the clients' conditions for secure aggregation; None without it."""
        return terms_of(self.config, self.built)

    def fix_bits(self) -> None:
        """Configure torch in this process as in every process of the run."""
        fix_bits(self.config.engine.threads, pick_device(self.config.device))

    @override
    def __reduce__(self) -> tuple[Callable[..., TaskBuilder], tuple[object, ...]]:
        """Return the arguments from which another process rebuilds its builder."""
        config = self.config
        objects = config.registered_for_clients
        return _arrived, (config, self.built, self.plan, objects, trusted(), of_main())


def _arrived(
    config: TaskConfig,
    built: PreparedTask,
    plan: Plan,
    program: Mapping[str, Any],
    modules: Sequence[str],
    named: Sequence[type[RegisteredByName]],
) -> TaskBuilder:
    """Rebuild the builder in another process, with the program's objects and trusted modules."""
    trust(modules)
    for kind in named:
        kind.register()
    for name, thing in program.items():
        register_object(thing, name)
    builder = TaskBuilder(config)
    vars(builder).update(built=built, plan=plan)
    return builder
