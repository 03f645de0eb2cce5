"""Define round steps, whose hooks change a round, and the list that runs them.

A step works between the method and its clients. The list has the order in which updates pass the
steps, from the reply to the next state; every hook is called in that order.
"""

# ruff: noqa: ARG002
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, cast

import torch

from fedraclora.aggregation.base import AggregationContext
from fedraclora.binding import object_of
from fedraclora.compatibility import Feature, declared_by
from fedraclora.errors import ConfigError
from fedraclora.object_registry import is_named
from fedraclora.protocol.method import Draw, Method, RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.callback import Callback
from fedraclora.run.ledger import Row
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.server.callbacks import GuardedHooks, each_of, joined
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.measuring import EvaluationPlan, Measurement
from fedraclora.strategies.server.sound import OF_STEPS
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree
from fedraclora.wire.answers import Came
from fedraclora.wire.exchange import Ask

Send = Callable[[Sequence[Ask]], Came]
Sizes = Callable[[torch.Tensor], torch.Tensor]
CloseRound = Callable[[Uplinks], State]
PLAIN = (str, int, float, tuple, type(None))  # values whose repr is the same everywhere
CohortOf = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class RunContext:
    """Hold facts of a run that a step may use.

    Attributes:
        method: The algorithm.
        local: Settings of the clients.
        loop: Settings of the round loop.
        devices: The clients' devices.
        sizes: Returns the samples of clients, int64 [K].
        examples: Returns the samples that weight clients, int64 [K], before packing.
        measuring: Which clients measure, and when; None: none.
    """

    method: Method
    local: LocalConfig
    loop: LoopConfig
    devices: DeviceSimulator
    sizes: Sizes = torch.ones_like
    examples: Sizes = torch.ones_like
    measuring: EvaluationPlan | None = None

    @property
    def draw(self) -> Draw:
        """Return the method's random sketches."""
        return Draw(self.loop.seed)

    @Feature(
        "fewer measuring clients than evaluate.min_clients",
        instead=(
            "evaluate.clients=none or all, more clients_per_round or a lower "
            "evaluate.min_clients (3 or more)"
        ),
    )
    def _measures_by_few(self) -> str:
        if self.measuring is None:
            return ""
        count, least = self.measuring.count(self.loop), self.measuring.asked.min_clients
        settings = f"evaluate.clients asks {count}, evaluate.min_clients={least}"
        return settings if count < least else ""


class RoundStep:
    """Base class of round steps: every hook does nothing; override those that you need.

    Pass your own to ``fedraclora.simulate(steps=[...])``. It serves one run at a time, which calls
    `begin` first. It declares incompatible features by
    ``@fedraclora.Feature(name, instead=..., avoids={...})`` (`fedraclora.compatibility`).

    Attributes:
        settings: The value of the config key that chose it; None if a program created it.
        first: For a program's step: whether it sees the raw updates before all other steps; else it
            comes last, and sees the method's input.
        individuals: Whether it needs the updates of single clients; if not, a sum is enough. If the
            server only receives a sum, such a step is refused before the first round.
        repeatable: Whether `treat` may be called twice in a round, the second time without a client
            whose update was too large.
        spent: The column of the ledger whose last value holds for the whole run; None: none.
        own: Whether it is a program's own.
        run: Facts of the run, set by `RoundSteps`.
    """

    settings: Any = None
    first: bool = False
    individuals: bool = False
    repeatable: bool = True
    spent: str | None = None
    own: bool = False
    run: RunContext

    @Feature("another round step that needs each client's update", instead="steps without it")
    def _looks_at_updates(self) -> str:
        declared = declared_by(type(self.settings))  # what chose it says itself what it is
        return f"the step {step_name(self)}" if self.individuals and not declared else ""

    @Feature("a round step of yours with first=True", instead="steps without it")
    def _stands_first(self) -> str:
        return f"the step {step_name(self)}" if self.first else ""

    def begin(self, state: State) -> None:
        """Prepare before the first round, with its state.

        Raises:
            ConfigError: If this step does not support the run.
        """

    def open(self, recorder: RunRecorder, done: int, cohort_of: CohortOf) -> None:
        """Restore the state of the step, before round ``done + 1``.

        Args:
            recorder: The run's recorder, with folder and ledger.
            done: Finished rounds.
            cohort_of: Returns the clients that a round asks, by its number.
        """

    def cohort(self, round_: int) -> torch.Tensor | None:
        """Draw the clients that a round asks, ids ascending, int64; None: as the devices decide."""
        return None

    def send(self, sent: RoundInstructions, state: State) -> RoundInstructions:
        """Change the method's instructions to the clients."""
        return sent

    def bound(self, *, first: bool) -> float | None:
        """Return the largest norm of an update that clients may send; None: any.

        Args:
            first: Whether this exchange opens the round.
        """
        return None

    def receive(self, send: Send, exchange: Exchange, base: Tree) -> Uplinks | None:
        """Run an exchange and return its checked updates; None: the default exchange.

        Args:
            send: Sends requests, and returns replies.
            exchange: The exchange.
            base: The weights from which clients train.
        """
        return None

    def measurers(self, round_: int) -> torch.Tensor | None:
        """Draw the clients that measure after a round, ids ascending, int64; None: by config."""
        return None

    def measure(self, send: Send, measurement: Measurement) -> bool:
        """Let clients measure, and pass the replies to the measurement; False: the default way.

        Args:
            send: Sends requests, and returns replies.
            measurement: The measurement.
        """
        return False

    def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
        """Change the uplinks for the next step."""
        return uplinks

    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        """Compute the next state.

        Args:
            close: Computes it from uplinks: the following steps, and then the method.
            state: The state before the round.
            exchange: The round's last exchange.
            uplinks: The updates after all steps.
        """
        return close(uplinks)

    def columns(self, exchange: Exchange, uplinks: Uplinks | None) -> Row:
        """Compute this step's columns of the ledger.

        Args:
            exchange: The round's last exchange.
            uplinks: The updates after all steps; None if the round was skipped since too few
                clients replied: then `treat` may not have been called in this round.
        """
        return {}


def step_of(step: object) -> object:
    """Return the program's own step inside a wrapper, or the step itself."""
    return step.inner if isinstance(step, GuardedHooks) else step


def step_name(step: object) -> str:
    """Return a step's name for messages."""
    return type(step_of(step)).__qualname__


def described(step: object) -> str:
    """Describe a program's own step: its class, and its arguments.

    Arguments are read from attributes with their names. A resumed run recognizes the step by this.
    """
    inner = step_of(step)
    kept = [name for name in signature(type(inner)).parameters if name in vars(inner)]
    values = [(name, vars(inner)[name]) for name in kept]
    arguments = [
        f"{n}={v!r}" if isinstance(v, PLAIN) else f"{n}=<{type(v).__name__}>" for n, v in values
    ]
    return f"{step_name(step)}({', '.join(arguments)})"


def own_steps(given: object) -> list[RoundStep]:
    """Check a program's own steps; those that the config names are created later.

    Raises:
        ConfigError: If an object is no step.
    """
    things = [thing for thing in each_of(given) if not isinstance(thing, str | Mapping)]
    for thing in things:
        if isinstance(thing, RoundStep) and sum(other is thing for other in things) == 1:
            continue
        why = "expected a fedraclora.RoundStep"
        if isinstance(thing, RoundStep):
            why = "list each object once"
        elif isinstance(thing, type) and issubclass(thing, RoundStep):
            why = f"expected an object, {thing.__name__}(...)"
        elif isinstance(thing, Callback) or callable(thing):
            why = "pass a callback in callbacks=[...]"
        raise ConfigError(f"steps has {thing!r:.200}; {why}")
    return [
        cast(RoundStep, GuardedHooks(thing, f"the step {step_name(thing)}", OF_STEPS))
        for thing in things
    ]


def steps_of(said: Sequence[object], given: Sequence[RoundStep]) -> list[RoundStep]:
    """List the user's steps of a run, in their order.

    Args:
        said: The key ``steps``: names of objects, or descriptions of passed ones.
        given: The program's own steps.

    Raises:
        ConfigError: If the passed steps differ from those in the config.
    """
    left, found = [*given], []
    for place, word in enumerate(said):
        if isinstance(word, Mapping) or is_named(word):
            found += own_steps(object_of(f"steps[{place}]", word, RoundStep))
        elif left and described(left[0]) == word:
            found.append(left.pop(0))
        else:
            left = [*given]
            break
    if left or len(found) < len(said):
        raise ConfigError(
            f"this run was made with the steps {[*said]} of a Python program, but "
            f"{[*map(described, given)]} are given. Call fedraclora.simulate(steps=[...]) "
            "with the same objects (folder=..., resume=True to resume)"
        )
    return found


class RoundSteps:
    """Run the steps of a round; the hooks are those of `RoundStep`.

    Args:
        steps: In the order in which updates pass them.
        run: Facts of the run.
        state: The state before the first round.

    Raises:
        ConfigError: If steps are incompatible.
    """

    def __init__(self, steps: Sequence[RoundStep], run: RunContext, state: State) -> None:
        self.steps, self.run = tuple(steps), run
        for step in self.steps:
            step.run = run
        for step in self.steps:
            step.begin(state)

    @property
    def sums_are_enough(self) -> bool:
        """Return whether no step needs single clients' updates."""
        method = self.run.method
        looks = method.looks_at_clients or any(step.individuals for step in self.steps)
        return method.traits.linear and not looks

    @property
    def repeatable(self) -> bool:
        """Return whether a round can be closed again without a client."""
        return all(step.repeatable for step in self.steps)

    def open(self, recorder: RunRecorder, done: int) -> None:
        """Restore the state of all steps."""
        for step in self.steps:
            step.open(recorder, done, self.cohort)

    def cohort(self, round_: int) -> torch.Tensor:
        """Draw the clients that a round asks; ids in ascending order, int64."""
        for step in self.steps:
            if (drawn := step.cohort(round_)) is not None:
                return drawn
        loop, devices = self.run.loop, self.run.devices
        return devices.system.ask(loop.seed, round_, loop.clients, loop.cohort, devices.now)

    def send(self, sent: RoundInstructions, state: State) -> RoundInstructions:
        """Pass the method's instructions through all steps."""
        for step in self.steps:
            sent = step.send(sent, state)
        return sent

    def bound(self, *, first: bool) -> float | None:
        """Return the largest norm of an update that clients may send: of the first such step."""
        named = (step.bound(first=first) for step in self.steps)
        return next((bound for bound in named if bound is not None), None)

    def receive(self, send: Send, exchange: Exchange, base: Tree) -> Uplinks:
        """Run an exchange and return its checked updates."""
        for step in self.steps:
            if (uplinks := step.receive(send, exchange, base)) is not None:
                return uplinks
        return exchange.collect(send(exchange.asks))

    def measurers(self, round_: int) -> torch.Tensor | None:
        """Draw the clients that measure after a round; None: as configured."""
        named = (step.measurers(round_) for step in self.steps)
        return next((drawn for drawn in named if drawn is not None), None)

    def measure(self, send: Send, measurement: Measurement) -> None:
        """Let clients measure; the measurement stores the replies."""
        if not any(step.measure(send, measurement) for step in self.steps):
            measurement.gather(send)

    def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
        """Pass the uplinks through all steps, to the method."""
        for step in self.steps:
            uplinks = step.treat(uplinks, context)
        return uplinks

    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        """Compute the next state; ``close`` is the method's own function."""
        for step in reversed(self.steps):
            close = partial(step.close, close, state, exchange)
        return close(uplinks)

    def columns(self, exchange: Exchange, uplinks: Uplinks | None) -> list[Row]:
        """Compute the columns of each step."""
        return [step.columns(exchange, uplinks) for step in self.steps]

    def added(self, row: Row, columns: Sequence[Row]) -> Row:
        """Add the columns of each step to a row.

        Raises:
            ConfigError: If a step of a program's own has a column that the row has already.
        """
        for step, found in zip(self.steps, columns, strict=True):
            row = joined(row, found, f"the step {step_name(step)}") if step.own else row | found
        return row

    def summary(self, row: Row) -> Row:
        """Summarize the run from the last row of the ledger."""
        names = (step.spent for step in self.steps)
        return {name: row[name] for name in names if name is not None and name in row}
