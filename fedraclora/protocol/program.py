"""Client programs: the part of local training that a method or a setting defines.

A method sends its program with each exchange (`RoundInstructions.program`), with the program's
fields as payload; a setting adds one to every round (``local.extras``). Both are a
`ClientProgram`, and the trainer calls the same hooks of both. Gradients and values carry a leading
client axis [K, ...].
"""

# Hooks have arguments that only some overrides use.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from fedraclora.limits import Limited
from fedraclora.protocol.link import Plan, Terms
from fedraclora.protocol.named import RegisteredByName
from fedraclora.tree import Tree, parameters

if TYPE_CHECKING:
    from fedraclora.protocol.instructions import RoundInstructions
    from fedraclora.protocol.uplinks import Uplinks

Rates = dict[str, float]  # step size of each trained tensor
# From gradients and values, [active, ...] by name, to new gradients.
Hook = Callable[[Tree, Tree], Tree]
# From values and frozen factors to loss, count and validity of each sample, [active, width].
Forward = Callable[[Tree, Tree], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def mean_losses(losses: torch.Tensor, counts: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute the mean loss of each client, [active], from the result of a `Forward`."""
    mask = valid.to(losses.dtype)
    return (losses * mask).sum(dim=1) / (counts * mask).sum(dim=1).clamp(min=1)


@dataclass(frozen=True)
class LocalResult:
    """Hold the results of a chunk of clients, in the order in which they were asked.

    Attributes:
        trained: Every trained tensor by name, [K, ...].
        losses: Mean loss over the local steps of each client, float64 [K].
        steps: Local steps taken, int64 [K].
        samples: Training samples of each client, unpacked, int64 [K].
        moments: Moments of their optimizers, if these are kept (`moments`), [K, ...] by name.
        states: States that a user's training function keeps for clients, by id.
        metrics: Metrics that it reports, float64 [K] by name; NaN if missing.
    """

    trained: Tree
    losses: torch.Tensor
    steps: torch.Tensor
    samples: torch.Tensor
    moments: Tree = field(default_factory=dict)
    states: dict[int, bytes] = field(default_factory=dict)
    metrics: Tree = field(default_factory=dict)


class GradientStage(IntEnum):
    """Choose after which part of a local step a hook changes the gradients."""

    LOSS = 0  # gradients of the loss: a term may be added to it
    PROGRAM = 1  # for the method's program
    BUDGET = 2  # cut to the components that a client trains
    CLIP = 3  # as the optimizer will receive them


class Optimizer(Protocol):
    """Define the optimizer's steps for a chunk of clients."""

    def step(self, gradients: Tree) -> None:
        """Take one step for the active clients: the first rows of each tensor."""

    def moments(self, steps: torch.Tensor) -> Tree:
        """Return the moments that outlive the round, after ``steps`` of each client, int64 [K]."""


class GradientFunction(Protocol):
    """Define gradients of a chunk that replace those of the loss."""

    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        """Compute mean losses and gradients of a local step; see `ClientProgram.gradients`."""


@dataclass(frozen=True, kw_only=True)
class ClientChunk:
    """Hold the trained tensors of a chunk of clients; clients with fewer steps come last.

    Attributes:
        downlink: The instructions.
        clients: Ids, int64 [K].
        seed: The seed of the run.
        round_: From 1.
        key: Secret key for draws that must not follow from the seed; None: draws use the seed.
        values: Trained tensors, [K, ...] by name.
        starts: Their starting values, [1, ...] or [K, ...].
        frozen: Frozen factors: 2-D if clients share them.
        ranks: Rank budgets (`fedraclora.protocol.rank_budgets.spans`), or None.
        masks: Trained entries of tensors (`fedraclora.protocol.rank_budgets.trainable`).
        local: Settings of local training (`fedraclora.training.localconfig.LocalConfig`).
        moments: Initial moments of optimizers, [K, ...] by the names under which clients keep them;
            empty: zero.
        measured: Tensors that a program's hooks leave for its `ClientProgram.upload`, [K, ...] by
            a name of yours. Empty at the start of the chunk's training.
    """

    downlink: RoundInstructions
    clients: torch.Tensor
    seed: int
    round_: int
    key: bytes | None
    values: Tree
    starts: Tree
    frozen: Tree
    ranks: torch.Tensor | None
    masks: Tree
    local: Any = None
    moments: Tree = field(default_factory=dict)
    measured: Tree = field(default_factory=dict)


class ClientProgram(RegisteredByName, Limited, group="local.extras"):
    """Define a client's local training; this base class changes nothing.

    Override the hooks that you need. A program that a method sends has a ``name``, and its fields
    are sent with it: plain numbers, texts, and lists, dicts and dataclasses of these.

    Attributes:
        form: The setting that adds it, with the names of its fields: ``local.prox={mu}``; empty:
            its name.
        plain: Whether clients still take plain local steps on all trained tensors.
        trains: Whether clients take local steps; False: they send the mean of their gradients at
            the start (`fedraclora.training.optimizer.GradientMean`).
        fixes: Whether some entries of trained tensors never have a gradient: they change only by
            something else.
        moves_weights: Whether clients train whole weights, and send something else instead.
        takes_factor_step: Whether it defines how the factors of an adapter take a step; at most one
            program may.
        ends_moments: Whether its moments become meaningless at the end of the round.
        forms_gradients: Whether `gradients` replaces those of the loss; at most one program may.
        answers_once: Whether a second reply to a round would reveal what the first one hides.
    """

    form: ClassVar[str] = ""
    plain: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    fixes: ClassVar[bool] = False
    moves_weights: ClassVar[bool] = False
    takes_factor_step: ClassVar[bool] = False
    ends_moments: ClassVar[bool] = False
    forms_gradients: ClassVar[bool] = False
    answers_once: ClassVar[bool] = False

    @property
    def setting(self) -> str:
        """Return the config setting that asks for it, for messages."""
        return self.form.format(**vars(self)) or type(self).__name__

    # Its form in a message.

    @property
    def stream(self) -> str:
        """Name the random stream for rounding uploads."""
        return self.name

    @property
    def payload_bytes(self) -> int:
        """Return the payload bytes: 8 for each number in its list and tuple fields.

        Single numbers and texts belong to the header of a message. Override it if other fields grow
        with the model.
        """
        return sum(8 * _listed(value) for value in vars(self).values())

    @property
    def frame(self) -> tuple[int, int, int] | None:
        """Return the recurring factor beside trained ones: position, number and index."""
        return None

    def stored_parts(self, weight: str, label: str) -> tuple[str, ...]:
        """Name the tensors beside a weight for a recurring factor, by position; none here."""
        return ()

    @property
    def keeps_direction(self) -> bool:
        """Return whether a part of a round's step continues in the next one (momentum)."""
        return False

    def check(self, downlink: RoundInstructions) -> None:
        """Reject invalid fields of a received message; types and limits were checked before.

        Raises:
            WireError: Naming the field, and the found and the expected value.
        """

    def initial_part(self) -> ClientProgram:
        """Return the part that determines the clients' initial weights (`fold`)."""
        return PLAIN

    # Hooks at the clients.

    def trained_model(self, downlink: RoundInstructions, plan: Plan) -> RoundInstructions:
        """Return what clients train, if it is not all that they send; see `upload`."""
        return downlink

    def fold(self, base: Mapping[str, torch.Tensor], plan: Plan) -> tuple[Tree, Terms]:
        """Compute the weights from which clients train, from the base weights.

        Args:
            base: A replica's weights, with the tensors kept beside them (names with a "/"). Not
                modified.
            plan: Has each weight's (out, in) view.

        Returns:
            The parameters, and terms of quantized weights, which are not merged.
        """
        return parameters(base), {}

    def most_steps(self, downlink: RoundInstructions) -> int | None:
        """Return the largest number of local steps; None: no limit."""
        return None

    def gradient_function(self, chunk: ClientChunk, base: Tree, steps: int) -> GradientFunction:
        """Return the object that computes the gradients of a chunk, if `forms_gradients`.

        Args:
            chunk: The clients.
            base: The weights from which they train, with the tensors beside them.
            steps: The most local steps of a client.
        """
        return self

    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        """Compute mean losses, [active], and gradients, [active, ...] by name, of a local step.

        Args:
            chunk: The clients.
            forward: Forward pass of the step's batch, with ``width`` samples of each active client.
            active: Clients that still train.
            width: See ``forward``.
            step: The local step, from 0.
        """
        raise NotImplementedError

    def hooks(self, chunk: ClientChunk) -> Mapping[GradientStage, Hook]:
        """Return the hooks on the gradients of every step; called once for each chunk.

        A hook receives gradients and values of the clients that still train, [active, ...]: the
        first ones of ``chunk.clients``. It is not called if no client takes a step.

        Raises:
            ConfigError: Where it does not fit what is trained.
        """
        return {}

    def optimizer(self, chunk: ClientChunk, rates: Rates) -> Optimizer | None:
        """Return an optimizer that replaces the local one; None: it has none.

        Args:
            chunk: The clients; its values are updated in place.
            rates: Step size of each value.

        Raises:
            ConfigError: Where it does not fit what is trained.
        """
        return None

    def moment_shapes(
        self, downlink: RoundInstructions, kinds: tuple[str, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an optimizer's state for one client.

        Args:
            downlink: The instructions.
            kinds: Its kinds of state for each tensor: ``first``, ``second``.

        Returns:
            By ``first/<name>`` and so on: as what is trained.
        """
        trained = downlink.trained().items()
        return {f"{kind}/{name}": slot.shape for kind in kinds for name, slot in trained}

    def upload(self, chunk: ClientChunk, before: Tree, after: Tree) -> Tree:
        """Return the tensors that clients send, by name, [K, ...]; for example with noise added.

        Each tensor of the round's instructions must be among them, also those that `trained_model`
        removes from the clients' model.

        Args:
            chunk: The clients, with what hooks have left in ``chunk.measured``. Draw random numbers
                for each client by its id, the round and the seed, as
                ``fedraclora.rng.generator(chunk.seed, "my noise", chunk.round_, client)``, so that
                no draw depends on the other clients of the chunk.
            before: The weights before training.
            after: Trained values, [K, ...] by name, in the order of ``chunk.clients``.
        """
        return after

    def sent(self, result: LocalResult) -> LocalResult:
        """Return the part of a result that clients send; a program may omit losses."""
        return result

    # Hooks at the server.

    def step_in_weights(self, scale: float, gram: float) -> tuple[float, float]:
        """Return s and c of the step of SGD in weight space (`effective_step`)."""
        return scale, gram

    def columns(self, sent: RoundInstructions, uplinks: Uplinks) -> dict[str, float]:
        """Compute the program's columns in the results table, for a round."""
        return {}


def _listed(value: object) -> int:
    """Count the numbers in nested lists and tuples."""
    if not isinstance(value, list | tuple):
        return 0
    return sum(isinstance(each, int | float) or _listed(each) for each in value)


@dataclass(frozen=True)
class LocalSteps(ClientProgram):
    """Run plain local steps."""

    name = "plain"
    plain = True


@dataclass(frozen=True)
class MeanGradient(ClientProgram):
    """Send the mean gradient at the start; take no step."""

    name = "gradient"
    trains = False


PLAIN, GRADIENT = LocalSteps(), MeanGradient()
