"""What a chunk of clients brought back from local training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedraclora.tree import Tree


@dataclass(frozen=True)
class LocalResult:
    """What a chunk of clients brought back, in the order in which they were asked.

    Attributes:
        trained: Every trained tensor by name, [K, ...].
        losses: Mean loss over the local steps of each client, float64 [K].
        steps: Local steps taken, int64 [K].
        samples: Training samples of each client, unpacked, int64 [K].
        moments: Of their optimisers where these live on (`moments`), [K, ...] by name.
    """

    trained: Tree
    losses: torch.Tensor
    steps: torch.Tensor
    samples: torch.Tensor
    moments: Tree = field(default_factory=dict)


def join(results: Sequence[LocalResult]) -> LocalResult | None:
    """Put the trials of a chunk's parts together, in order; what stays at clients is left out."""
    if len(results) < 2:
        return results[0] if results else None
    return LocalResult(
        {name: torch.cat([t.trained[name] for t in results]) for name in results[0].trained},
        torch.cat([t.losses for t in results]),
        torch.cat([t.steps for t in results]),
        torch.cat([t.samples for t in results]),
    )
