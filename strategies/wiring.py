"""Connect the parts of a run: the one place where strategy, files and engine meet.

All rounds are run through this module: runs of a config (`strategies.builder`), the benchmark, the
curves of the theory, the contract tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from fedraclora.devices.system import SystemConfig
from fedraclora.engines.base import Engine, Grid
from fedraclora.narrow_weight import dense
from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.protocol.method import Draw, Method, RoundInstructions, State, first_instructions
from fedraclora.run.callback import Callback
from fedraclora.run.client_state import ClientStore
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.buffered import BufferedStrategy
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.measuring import EvaluationPlan
from fedraclora.strategies.server.round_step import RoundStep, RunContext, Sizes
from fedraclora.strategies.steps import round_steps
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Tree, weights_of

INITIAL = (
    "initial_weights",
    "initial_state",
    "first_instructions",
)  # otherwise they last for all rounds


class RoundsBuilder:
    """Build the parts that run rounds; each is built once, when it is first read.

    Args:
        method: The algorithm.
        trainer: Trains chunks of clients in this process.
        loop: Settings of the round loop.
        engine: Where clients run.
        parts: Any other part, by the name of its property; None: the default.
    """

    method: Method
    trainer: CohortTrainer
    loop: LoopConfig
    engine: Engine
    folder: Path | None = None
    """The run folder, which exists where files are written; None: the run is in memory."""
    resume = False
    """Whether the run goes on from its checkpoint."""
    alone = False
    """Whether no other run begins from the model of the task, which is then this run's to change"""

    def __init__(
        self,
        method: Method,
        trainer: CohortTrainer,
        loop: LoopConfig,
        engine: Engine,
        **parts: Any,
    ) -> None:
        if unknown := [name for name in parts if not hasattr(type(self), name)]:
            raise TypeError(f"{unknown[0]} is not a part of a run")
        vars(self).update({name: part for name, part in parts.items() if part is not None})
        self.method, self.trainer, self.loop, self.engine = method, trainer, loop, engine

    @cached_property
    def draw(self) -> Draw:
        """Return the method's random sketches."""
        return Draw(self.loop.seed)

    @cached_property
    def initial_weights(self) -> Tree:
        """Return the initial weights of the model; released once there is a strategy."""
        return weights_of(self.trainer.task.model)

    @cached_property
    def initial_state(self) -> State:
        """Return the method's state before round 1; released once there is a strategy."""
        return self.method.initial_state(self.initial_weights, self.trainer.plan, self.draw)

    @cached_property
    def first_instructions(self) -> RoundInstructions:
        """Return round 1's instructions, for their shapes; released once there is a strategy."""
        return first_instructions(self.method, self.initial_state, self.draw, self.loop.cohort)

    @cached_property
    def store(self) -> ClientStore:
        """Return the clients' state between rounds, if they run in this process."""
        return ClientStore()

    @cached_property
    def terms(self) -> SecAggTerms | None:
        """Return the clients' conditions for secure aggregation; None without it."""
        return None

    @cached_property
    def recorder(self) -> RunRecorder:
        """Return the recorder of ledger, merges and checkpoints."""
        return RunRecorder(None, store=self.store)

    @cached_property
    def steps(self) -> Sequence[RoundStep]:
        """Return the steps of a round."""
        return round_steps({"local": self.trainer.local})

    @cached_property
    def callbacks(self) -> Sequence[Callback]:
        """Return the callbacks."""
        return ()

    @cached_property
    def measuring(self) -> EvaluationPlan | None:
        """Return which clients measure on their own samples, and when; None: none."""
        return None

    @cached_property
    def system(self) -> SystemConfig:
        """Return the clients' devices."""
        return SystemConfig()

    @cached_property
    def sizes(self) -> Sizes:
        """Return the function for clients' samples [K], if the server knows them in advance."""
        return torch.ones_like

    @cached_property
    def examples(self) -> Sizes:
        """Return the same function for samples before packing, which weight clients."""
        return torch.ones_like

    @cached_property
    def kind(self) -> type[FedStrategy]:
        """Return the class of strategy that the devices need."""
        return FedStrategy if self.system.buffer is None else BufferedStrategy

    @cached_property
    def context(self) -> RunContext:
        """Return the facts of the run for round steps."""
        local = self.trainer.local
        devices = DeviceSimulator(self.system, self.loop.seed, local)
        given = self.sizes, self.examples, self.measuring
        return RunContext(self.method, local, self.loop, devices, *given)

    @cached_property
    def strategy(self) -> FedStrategy:
        """Return the strategy, resumed if the run is."""
        state = self.initial_state
        strategy = self.kind(
            self.context,
            state,
            replica=self.engine.replica,
            recorder=self.recorder,
            steps=self.steps,
            callbacks=self.callbacks,
            model=self.trainer.task.model if self.alone else None,
        )
        if self.resume:
            restored, done = self.recorder.restore(state, strategy.catch_up)
            strategy.resume(restored, done)
            if self.recorder.chain is not None and self.engine.recall is not None:
                links = self.recorder.links()
                self.engine.recall(restored.base, links, strategy.catch_up.version)
        for name in INITIAL:
            vars(self).pop(name, None)
        return strategy

    @cached_property
    def grid(self) -> Grid:
        """Return the grid; its processes are started."""
        _ = self.strategy  # impossible runs are refused before any process starts
        return self.engine.start(self.trainer, self.store, self.terms)

    def ready(self) -> Self:
        """Build every part now; if that fails, end the engine. The caller closes it otherwise.

        Raises:
            FedRacLoraError: If parts are incompatible, or fail to start.
        """
        try:
            self.build()
        except BaseException:
            self.close()
            raise
        return self

    def build(self) -> None:
        """Build every part now, beginning with those that are cheap to refuse."""
        _ = self.grid

    def start(self, last: int | None = None) -> None:
        """Run the remaining rounds.

        Args:
            last: The last round; None: that of the loop.

        Raises:
            ClientError: If more clients failed than allowed, after a checkpoint.
        """
        self.strategy.run(self.grid, last)

    def weights(self) -> Tree:
        """Return the current effective weights: name of a parameter -> tensor of its shape."""
        return dense(self.strategy.method.weights(self.strategy.state, self.strategy.draw))

    def close(self) -> None:
        """Stop the engine's processes."""
        if "engine" in vars(self):
            self.engine.close()
