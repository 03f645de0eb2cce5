"""The seam of local training: what clients bring back, and what a setting may add.

The core calls `LocalExtra` and knows none of those that there are; they are in
`fedraclora.training.extras`. A training function of the user's brings `Trained`.
"""

# A hook has arguments that an override uses.
# ruff: noqa: ARG002

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Protocol

import torch

from fedraclora.errors import ClientError
from fedraclora.limits import Limited
from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.tree import Tree, join_columns


@dataclass(frozen=True)
class LocalResult:
    """What a chunk of clients brought back, in the order in which they were asked.

    Attributes:
        trained: Every trained tensor by name, [K, ...].
        losses: Mean loss over the local steps of each client, float64 [K].
        steps: Local steps taken, int64 [K].
        samples: Training samples of each client, unpacked, int64 [K].
        moments: Of their optimisers where these live on (`moments`), [K, ...] by name.
        states: What a user's training function keeps for clients, by id.
        metrics: What it says of its training, float64 [K] by name; NaN where it does not.
    """

    trained: Tree
    losses: torch.Tensor
    steps: torch.Tensor
    samples: torch.Tensor
    moments: Tree = field(default_factory=dict)
    states: dict[int, bytes] = field(default_factory=dict)
    metrics: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a client has trained: what `Round.read` gives, and a training function returns.

    Attributes:
        client, number: Whose, and of which round.
        tensors: By the names of the method, in its shapes.
        samples: That it trained on: its weight in the mean.
        steps: Optimiser steps that it took.
        loss: Mean training loss; None: it does not say.
        metrics: Further numbers of its training, by name.
    """

    client: int
    number: int
    tensors: Tree
    samples: int
    steps: int
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Reject numbers that cannot be.

        Raises:
            ClientError: Naming the number.
        """
        if not isinstance(self.metrics, Mapping):
            raise ClientError(f"metrics is {self.metrics!r:.100}; a dict of numbers is wanted")
        told = {str(n): _number(f"metrics[{n!r}]", v) for n, v in self.metrics.items()}
        counts = {key: _count(key, getattr(self, key)) for key in ("samples", "steps")}
        loss = None if self.loss is None else _number("loss", self.loss)
        vars(self).update(counts, loss=loss, metrics=told)


def _count(name: str, value: Any) -> int:
    """Take a whole number, also one of numpy or a tensor."""
    try:
        found = 0 if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):
        found = 0
    if not 1 <= found < 2**63:
        raise ClientError(f"{name} is {value!r:.100}; a whole number, 1 or more, is wanted")
    return found


def _number(name: str, value: object) -> float:
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    if not math.isfinite(found):
        raise ClientError(f"{name} is {value!r:.100}; a finite number is wanted")
    return found


def join_results(results: Sequence[LocalResult]) -> LocalResult | None:
    """Put the trials of a chunk's parts together, in order; what stays at clients is left out."""
    if len(results) < 2:
        return results[0] if results else None
    return LocalResult(
        {name: torch.cat([t.trained[name] for t in results]) for name in results[0].trained},
        torch.cat([t.losses for t in results]),
        torch.cat([t.steps for t in results]),
        torch.cat([t.samples for t in results]),
        metrics=join_columns([(t.metrics, len(t.losses)) for t in results]),
    )


Rates = dict[str, float]  # step size of each trained tensor
# From gradients and values, [active, ...] by name, to new gradients.
Hook = Callable[[Tree, Tree], Tree]
# From values and frozen factors to loss and count of each sample, and whether it is one, [active,
# width].
Forward = Callable[[Tree, Tree], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def mean_losses(losses: torch.Tensor, counts: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute the mean loss of each client, [active], from what a `Forward` gives."""
    mask = valid.to(losses.dtype)
    return (losses * mask).sum(dim=1) / (counts * mask).sum(dim=1).clamp(min=1)


class When(IntEnum):
    """After what of a local step a hook changes the gradients."""

    LOSS = 0  # they are those of the loss: a term may be added to it
    RECIPE = 1  # what the method says (`fedraclora.protocol.recipes`)
    BUDGET = 2  # cut to the components that a client trains
    CLIP = 3  # as the optimiser will have them


class Optimiser(Protocol):
    """Takes the steps of a chunk."""

    def step(self, gradients: Tree) -> None:
        """Take one step for the clients that still train: the first rows of each tensor."""

    def moments(self, steps: torch.Tensor) -> Tree:
        """Return the moments that outlive the round, after ``steps`` of each client, int64 [K]."""


@dataclass(frozen=True, kw_only=True)
class ClientChunk:
    """What a chunk of clients trains. Those that finish first stand last.

    Attributes:
        downlink: What was asked.
        clients: Ids, int64 [K].
        seed: Of the run.
        round_: From 1.
        key: Of what an answer draws that the seed must not tell; None: the seed may.
        values: What is trained, [K, ...] by name.
        starts: Where it started, [1, ...] or [K, ...].
        frozen: Factors that are not trained: 2-D where clients share them.
        ranks: Rank budgets (`fedraclora.protocol.rank_budgets.spans`), or None.
        masks: What of a tensor its client trains (`fedraclora.protocol.rank_budgets.trainable`).
    """

    downlink: Downlink
    clients: torch.Tensor
    seed: int
    round_: int
    key: bytes | None
    values: Tree
    starts: Tree
    frozen: Tree
    ranks: torch.Tensor | None
    masks: Tree


class LocalExtra(Limited, group="local.extras"):
    """What a setting adds to plain local training; as it stands here, nothing.

    Attributes:
        form: How a config asks for it, with the names of its fields: ``local.prox={mu}``; empty:
            its name.
        takes_factor_step: Whether it says how the factors of an adapter take a step; one may.
        ends_moments: Whether its moments speak of what ends with the round.
        forms_gradients: Whether `gradients` stands in the place of those of the loss; one may.
        answers_once: Whether a second answer to a round would tell what the first one hides.
    """

    form: ClassVar[str] = ""
    takes_factor_step: ClassVar[bool] = False
    ends_moments: ClassVar[bool] = False
    forms_gradients: ClassVar[bool] = False
    answers_once: ClassVar[bool] = False

    @property
    def setting(self) -> str:
        """How the config asks for it, for messages."""
        return self.form.format(**vars(self)) or type(self).__name__

    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        """Compute mean losses, [active], and gradients, [active, ...] by name, of a local step.

        Args:
            chunk: Of clients.
            forward: Of the step's batch, which has ``width`` samples of each active client.
            active: Clients that still train.
            width: See ``forward``.
            step: The local step, from 0.
        """
        raise NotImplementedError

    def hooks(self, chunk: ClientChunk) -> Mapping[When, Hook]:
        """Return the hooks on the gradients of every step.

        Raises:
            ConfigError: Where it does not fit what is trained.
        """
        return {}

    def optimiser(self, chunk: ClientChunk, rates: Rates) -> Optimiser | None:
        """Return the optimiser in the place of the core's; None: it has none.

        Args:
            chunk: Of clients; its values are updated in place.
            rates: Step size of each of them.

        Raises:
            ConfigError: Where it does not fit what is trained.
        """
        return None

    def sent(self, result: LocalResult) -> LocalResult:
        """Select what leaves the clients from their result, after they have stored their state."""
        return result

    def step_in_weights(self, scale: float, gram: float) -> tuple[float, float]:
        """Compute s and c of the step that SGD takes in weight space (`effective_step`)."""
        return scale, gram

    def columns(self, sent: Downlink, got: Uplinks) -> dict[str, float]:
        """Compute the ledger's columns of a round, from what was asked and what came back."""
        return {}
