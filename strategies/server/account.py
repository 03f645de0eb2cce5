"""What sample-level privacy (`local.dp`) has cost so far, client by client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.training.localconfig import LocalConfig
from strategies.server.rows import Row

Sizes = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class SampleAccount:
    """Counts the passes that clients have made over their data.

    Attributes:
        dp: Clip and noise.
        local: Says how many passes a round makes.
        sizes: Gives the samples of clients, int64 [K].
        passes: Of each client so far, int64 [N].
    """

    dp: SampleNoise
    local: LocalConfig
    sizes: Sizes
    passes: torch.Tensor
    _known: dict[int, float] = field(default_factory=dict)

    def add(self, clients: torch.Tensor) -> None:
        """Count a round that these clients (ids, int64) took part in."""
        local = self.local
        if local.steps is None:
            self.passes[clients] += local.epochs
            return
        samples = self.sizes(clients).clamp(min=1)
        batch = torch.full_like(samples, local.batch_size) if local.batch_size else samples
        each = (samples + batch - 1) // batch  # steps of a pass
        self.passes[clients] += (local.steps + each - 1) // each

    def row(self) -> Row:
        """What the ledger says: the cost to the samples of the client with the most passes."""
        most = int(self.passes.max())
        if most not in self._known:
            self._known[most] = self.dp.epsilon(most)
        return {"epsilon": self._known[most], "delta": self.dp.delta, "passes": most}
