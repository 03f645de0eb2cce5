"""Run the steps of local settings: an account of privacy, and row moments.

Second moments of rows are sent with each round, and averaged on return; the formulas are in
`fedraclora.training.optimizer`. They are sent like trained tensors, so that every engine and every
rule for those supports them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from typing_extensions import override

from fedraclora.compatibility import conflict
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.protocol.method import ASKS_TWICE, RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import Row
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, CohortOf, RoundStep
from fedraclora.strategies.wrappers.around import inside
from fedraclora.training.extras.settings import SampleLevel
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimizer import ROW_SLOT, row_slots


def follows_gradient(local: LocalConfig) -> bool:
    """Check whether a component moves by a multiple of its gradient, the same for all of a client.

    Adam's steps have the same size for every row, and a preconditioner divides by the lengths of
    rows, so that an estimate of the gradient from them would only return the step size; a layer
    that is clipped by itself would count too little beside the others.
    """
    return local.optimizer == "sgd" and not local.added and local.clip_by == "all"


class WithoutGradientFigures(RoundStep):
    """Remove ledger figures that local steps do not support (`Method.gradient_figures`)."""

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        after = close(uplinks)
        wrong = {name for each in inside(self.run.method) for name in each.gradient_figures}
        return replace(after, report={n: x for n, x in after.report.items() if n not in wrong})


@dataclass
class SampleAccount(RoundStep):
    """Count the passes that clients have made over their data.

    Attributes:
        dp: Clip and noise.
        passes: Passes of each client so far, int64 [N]; set by `begin`.
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
            raise conflict(SampleLevel, ASKS_TWICE)
        return None

    @override
    def columns(self, exchange: Exchange, uplinks: Uplinks | None) -> Row:
        self._count(lambda: exchange.first.cohort.clients)
        return {"train_loss": None, "sample_privacy": self.row()}

    def _count(self, asked: Callable[[], torch.Tensor]) -> None:
        """Count a round; if devices differ, as if all clients had taken part."""
        everyone = torch.arange(len(self.passes))
        self.add(everyone if self.run.devices.system.enabled else asked())

    def add(self, clients: torch.Tensor) -> None:
        """Count a round for these clients (ids, int64)."""
        local = self.run.local
        if local.steps is None:
            self.passes[clients] += local.epochs
            return
        samples = self.run.sizes(clients).clamp(min=1)
        batch = torch.full_like(samples, local.batch_size) if local.batch_size else samples
        each = (samples + batch - 1) // batch  # steps of a pass
        self.passes[clients] += (local.steps + each - 1) // each

    def row(self) -> Row:
        """Return the ledger's figures: the cost to samples of the client with the most passes."""
        most = int(self.passes.max())
        return {"epsilon": self.dp.epsilon(most), "delta": self.dp.delta, "passes": most}


class RowMoments(RoundStep):
    """Keep row moments with the moments of the state."""

    @override
    def send(self, sent: RoundInstructions, state: State) -> RoundInstructions:
        if not sent.program.trains:  # only gradients are requested
            return sent
        return replace(sent, dense=sent.dense | row_slots(sent, state.moments))

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        after, sent = close(uplinks), exchange.downlink
        names = [name for name in sent.dense if name.startswith(ROW_SLOT)]
        if not names and sent.program.trains:
            raise conflict(LocalConfig, ASKS_TWICE)
        if not names or not len(uplinks.clients):
            return after
        mean, dtype = uplinks.mean(), next(iter(state.base.values())).dtype
        # Attackers, or a rule for single coordinates, may make a moment negative.
        moments = {n: mean[n].clamp(min=0).to("cpu", dtype) for n in names}
        return replace(after, moments=after.moments | moments)
