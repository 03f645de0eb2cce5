"""Wires a run: the one place where the strategy, its files and its engine meet.

Whatever runs rounds goes through `wire`: the command line and `fedraclora.simulate` (by
`strategies.assembly`), Flower's app, the benchmark, the curves of the theory, the contract tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from fedraclora.devices.system import SystemConfig
from fedraclora.engines.base import Engine, EngineParts, Grid
from fedraclora.narrow_weight import dense
from fedraclora.protocol.method import Draw, Method, State
from fedraclora.run.callback import Callback
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.buffered import BufferedStrategy
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.measuring import Measuring
from fedraclora.strategies.server.round_step import RoundStep, RunContext, Sizes
from fedraclora.strategies.steps import round_steps
from fedraclora.tree import Tree, weights_of


@dataclass(frozen=True)
class Wired:
    """A run that is ready to start.

    Attributes:
        strategy: Drives the rounds.
        engine: Owns the grid.
        grid: Where clients run.
    """

    strategy: FedStrategy
    engine: Engine
    grid: Grid

    def start(self, last: int | None = None) -> None:
        """Run the rounds that are left.

        Args:
            last: The last round; None: that of the loop.

        Raises:
            ClientError: If more clients failed than allowed, after a checkpoint.
        """
        self.strategy.run(self.grid, last)

    def weights(self) -> Tree:
        """Return the effective weights now: name of a parameter -> tensor of its shape."""
        return dense(self.strategy.method.weights(self.strategy.state, self.strategy.draw))

    def close(self) -> None:
        """End what the engine started."""
        self.engine.close()


def wire(
    method: Method,
    parts: EngineParts,
    loop: LoopConfig,
    engine: Engine,
    *,
    state: State | None = None,
    recorder: RunRecorder | None = None,
    resume: bool = False,
    steps: Sequence[RoundStep] | None = None,
    system: SystemConfig | None = None,
    sizes: Sizes = torch.ones_like,
    examples: Sizes = torch.ones_like,
    callbacks: Sequence[Callback] = (),
    measuring: Measuring | None = None,
    kind: type[FedStrategy] | None = None,
    alone: bool = False,
) -> Wired:
    """Build the strategy and start the engine.

    Args:
        method: The algorithm.
        parts: Task, trainer and what clients keep.
        loop: Settings of the round loop.
        engine: Where clients run; it is ended where the run cannot be wired.
        state: The method's state before round 1; None: it begins from the weights of the model.
        recorder: Ledger, chain and checkpoints; None: rows are kept in memory alone.
        resume: Go on from the book's checkpoint.
        steps: What happens to a round besides; None: nothing was chosen.
        system: The clients' devices; None: ideal ones.
        sizes: Samples of clients [K], where the server knows them before they train.
        examples: The same, unpacked: what clients are weighted by.
        callbacks: What watches the rounds, or ends them early.
        measuring: Which clients measure on samples of their own, and when; None: none does.
        kind: The strategy; None: the one that these devices need.
        alone: Whether no other run begins from the model of the task, which is then this run's to
            change.

    Returns:
        The run; whoever has it closes it.

    Raises:
        FedRacLoraError: Whatever cannot be together, or does not start.
    """
    trainer, system = parts.trainer, system or SystemConfig()
    if state is None:
        state = method.initial_state(weights_of(trainer.task.model), trainer.plan, Draw(loop.seed))
    recorder = recorder or RunRecorder(None, store=parts.store)
    kind = kind or (FedStrategy if system.buffer is None else BufferedStrategy)
    with ExitStack() as failed:
        failed.callback(engine.close)
        devices = DeviceSimulator(system, loop.seed, trainer.local)
        strategy = kind(
            RunContext(method, trainer.local, loop, devices, sizes, examples, measuring),
            state,
            replica=engine.replica,
            recorder=recorder,
            steps=round_steps({"local": trainer.local}) if steps is None else steps,
            callbacks=callbacks,
            model=trainer.task.model if alone else None,
        )
        if resume:
            restored, done = recorder.restore(state, strategy.catch_up)
            strategy.resume(restored, done)
            if recorder.chain is not None and engine.recall is not None:
                engine.recall(restored.base, recorder.links(), strategy.catch_up.version)
        wired = Wired(strategy, engine, engine.start(parts))
        failed.pop_all()
    return wired
