"""Hold the result of a user's training function (`Trained`), and join results of chunks."""

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
    """Hold one client's result: returned by `Round.read`, and by a training function.

    Attributes:
        client, number: The client and the round.
        tensors: By the names of the method, in its shapes.
        samples: Training samples: the client's weight in the mean.
        steps: Optimizer steps taken.
        loss: Mean training loss; None: unknown.
        metrics: Further numbers of its training, by name.
        seal: Checksum of all this by `Round.read`; 0: not created by it.
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
        """Reject impossible numbers.

        Raises:
            ClientError: Naming the number.
        """
        if not isinstance(self.metrics, Mapping):
            raise ClientError(f"metrics is {self.metrics!r:.100}, expected a dict of numbers")
        metrics = {str(n): _number(f"metrics[{n!r}]", v) for n, v in self.metrics.items()}
        counts = {key: _count(key, getattr(self, key)) for key in ("samples", "steps")}
        loss = None if self.loss is None else _number("loss", self.loss)
        vars(self).update(counts, loss=loss, metrics=metrics)


def _count(name: str, value: Any) -> int:
    """Convert a whole number, also one of numpy or a tensor."""
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
    """Join the results of parts of a chunk, in order, without personal tensors."""
    if len(results) < 2:
        return results[0] if results else None
    return LocalResult(
        {name: torch.cat([t.trained[name] for t in results]) for name in results[0].trained},
        torch.cat([t.losses for t in results]),
        torch.cat([t.steps for t in results]),
        torch.cat([t.samples for t in results]),
        metrics=join_columns([(t.metrics, len(t.losses)) for t in results]),
    )
