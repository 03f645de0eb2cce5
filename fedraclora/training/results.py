"""What a training function of the user's brings: `Trained`; and chunks of results, joined."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedraclora.errors import ClientError
from fedraclora.protocol.program import LocalResult
from fedraclora.tree import Tree, join_columns


@dataclass(frozen=True)
class Trained:
    """What a client has trained: what `Round.read` gives, and a training function returns.

    Attributes:
        client, number: Whose, and of which round.
        tensors: By the names of the method, in its shapes.
        samples: That it trained on: its weight in the mean.
        steps: Optimizer steps that it took.
        loss: Mean training loss; None: it does not say.
        metrics: Further numbers of its training, by name.
        seal: Of all this, as `Round.read` gave it; 0: it did not.
    """

    client: int
    number: int
    tensors: Tree
    samples: int
    steps: int
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seal: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        """Reject numbers that cannot be.

        Raises:
            ClientError: Naming the number.
        """
        if not isinstance(self.metrics, Mapping):
            raise ClientError(f"metrics is {self.metrics!r:.100}, expected a dict of numbers")
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
        raise ClientError(
            f"{name} is {value!r:.100}, expected a whole number from 1 to {2**63 - 1}"
        )
    return found


def _number(name: str, value: object) -> float:
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        found = math.nan
    if not math.isfinite(found):
        raise ClientError(f"{name} is {value!r:.100}, expected a finite number")
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
