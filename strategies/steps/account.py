"""What sample-level privacy (`local.dp`) has cost so far, client by client."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from typing_extensions import override

from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.protocol.method import State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import Row
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CohortOf, RoundStep
from fedraclora.strategies.steps.conflicts import TWICE, refused


@dataclass
class SampleAccount(RoundStep):
    """Counts the passes that clients have made over their data.

    Attributes:
        dp: Clip and noise.
        passes: Of each client so far, int64 [N]; by `begin`.
    """

    dp: SampleNoise
    passes: torch.Tensor = field(init=False)

    spent = "sample_privacy"

    @override
    def begin(self, state: State) -> None:
        self.passes = torch.zeros(self.run.loop.clients, dtype=torch.int64)

    @override
    def open(self, recorder: RunRecorder, done: int, cohort_of: CohortOf) -> None:
        for round_ in range(1, done + 1):
            self._count(partial(cohort_of, round_))

    @override
    def bound(self, *, first: bool) -> float | None:
        if not first:
            raise refused(TWICE, "local.dp")
        return None

    @override
    def columns(self, exchange: Exchange, got: Uplinks | None) -> Row:
        self._count(lambda: exchange.first.cohort.clients)
        return {"train_loss": None, "sample_privacy": self.row()}

    def _count(self, asked: Callable[[], torch.Tensor]) -> None:
        """Count a round; where devices differ, as if all clients had taken part."""
        everyone = torch.arange(len(self.passes))
        self.add(everyone if self.run.devices.system.enabled else asked())

    def add(self, clients: torch.Tensor) -> None:
        """Count a round that these clients (ids, int64) took part in."""
        local = self.run.local
        if local.steps is None:
            self.passes[clients] += local.epochs
            return
        samples = self.run.sizes(clients).clamp(min=1)
        batch = torch.full_like(samples, local.batch_size) if local.batch_size else samples
        each = (samples + batch - 1) // batch  # steps of a pass
        self.passes[clients] += (local.steps + each - 1) // each

    def row(self) -> Row:
        """What the ledger says: the cost to the samples of the client with the most passes."""
        most = int(self.passes.max())
        return {"epsilon": self.dp.epsilon(most), "delta": self.dp.delta, "passes": most}
