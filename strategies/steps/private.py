"""Apply client-level differential privacy in the rounds of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, rows_of, starts
from fedraclora.aggregation.robust import shortened
from fedraclora.compatibility import conflict
from fedraclora.errors import CheckpointError
from fedraclora.privacy.accountant import Releases
from fedraclora.privacy.client_level import NORM_SLACK, ClientLevel, Mechanism, NoisyMeans
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.method import ASKS_TWICE, State
from fedraclora.protocol.uplinks import Uplinks, weighted_sum
from fedraclora.run.ledger import Row, number
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.measuring import Measurement
from fedraclora.strategies.server.round_step import CohortOf, RoundStep, Send


@dataclass
class PrivateRounds(RoundStep):
    """Sample clients, add noise and keep the privacy account.

    Attributes:
        config: Clip, noise, target.
        secret: Source of sampling and noise; None: `open` reads it from the run folder.
        mechanism: The noise of the run, set by `begin`.
        clip: C of the next round.
        row: The ledger's figures for the round of the last call of `treat`.
        means: The noise on clients' metrics; None: none measure. Set by `begin`.
        measured: Number of measurements so far.
    """

    config: ClientLevel
    secret: Secret | None = None
    mechanism: Mechanism = field(init=False)
    clip: float = field(init=False)
    row: Row = field(default_factory=dict)
    means: NoisyMeans | None = field(init=False, default=None)
    measured: int = 0

    individuals = True
    repeatable = False  # no noise may be drawn twice
    spent = "privacy"

    def __post_init__(self) -> None:
        """Begin with the clip of the settings."""
        self.clip = self.config.clip

    @override
    def begin(self, state: State) -> None:
        loop = self.run.loop
        measuring, planned = self.run.measuring, 0
        if measuring is not None:
            metrics = {point + name: name for point in measuring.points for name in measuring.names}
            count, least = measuring.count(loop), measuring.asked.min_clients
            self.means = NoisyMeans.of(self.config, metrics, count, loop.clients, least)
            planned = sum(measuring.due(r, loop.rounds) for r in range(loop.rounds + 1))
        beside = self._released(planned)
        self.mechanism = self.config.settle(loop.clients, loop.cohort, loop.rounds, *beside)

    def _released(self, measured: int) -> list[Releases]:
        return [] if self.means is None else [self.means.releases(measured)]

    def _epsilon(self, round_: int) -> float:
        return self.mechanism.epsilon(round_, *self._released(self.measured))

    @override
    def open(self, recorder: RunRecorder, done: int, cohort_of: CohortOf) -> None:
        rows = recorder.ledger.rows
        begun = len(rows) > 1
        self.measured = sum("clients" in row for row in rows)
        if begun:
            self.clip = number(rows[-1], "privacy", "next_clip")
            if not self.clip > 0:
                raise CheckpointError(
                    "the last row of the ledger has no privacy.next_clip, which a private "
                    "run needs to resume. Restore the ledger from a copy"
                )
        if self.secret is None:
            folder = recorder.folder
            self.secret = Secret() if folder is None else Secret.of_folder(folder, resume=begun)

    @property
    def source(self) -> Secret:
        """Return the secret once it is available."""
        if self.secret is None:
            raise CheckpointError(
                "the noise has no key, since the step was not opened. Call open() before the "
                "first round"
            )
        return self.secret

    @override
    def cohort(self, round_: int) -> torch.Tensor:  # possibly no clients
        return self.mechanism.sample(self.source, round_, self.run.loop.clients)

    @override
    def bound(self, *, first: bool) -> float:
        if not first:
            raise conflict(ClientLevel, ASKS_TWICE)
        return self.clip

    @override
    def treat(self, uplinks: Uplinks, context: AggregationContext) -> Uplinks:
        """Compute the noisy mean of updates; too long ones are clipped here, too."""
        start = starts(context, uplinks)
        clip, K = self.clip, len(uplinks.clients)
        if not K:
            total, norms = torch.zeros_like(start), torch.zeros(0)
        elif uplinks.stacked is None:  # secure aggregation: only clients can clip their updates
            total, norms = uplinks.sum() - start * K, torch.zeros(0)
        else:
            rows = rows_of(uplinks)
            norms = torch.linalg.vector_norm(rows - start, dim=1)
            ones = torch.ones(K, dtype=torch.float64)
            total = weighted_sum(shortened(rows, start, clip) - start, ones, uplinks.places)
        noisy = self.mechanism.noisy_sum(total, clip, self.source, context.round_)
        if self.mechanism.count_noise is not None:
            short = int((norms < clip * NORM_SLACK).sum())
            count = self.mechanism.noisy_count(short, K, self.source, context.round_)
            self.clip = self.config.next_clip(clip, count, self.mechanism.cohort)
        self.note(context.round_, clip)
        mean = start + noisy / self.mechanism.cohort
        return replace(uplinks, stacked=None, summed=mean, denominator=1.0)

    @override
    def measurers(self, round_: int) -> torch.Tensor | None:
        if self.means is None:
            return None
        return self.means.sample(self.source, round_, self.run.loop.clients)

    @override
    def measure(self, send: Send, measurement: Measurement) -> bool:
        if self.means is None:
            return False
        if len(measurement.cohort):
            measurement.gather(send)
        done = measurement.round_ - 1
        replied = sum(len(answer.clients) for answer in measurement.replies)
        values, measurement.replies = measurement.own(), []  # no single client's values are kept
        measurement.summed = {**self.means.released(values, replied, self.source, done)}
        self.measured += 1
        if not self.row:  # before round 1
            self.note(done, self.clip)
        self.row["epsilon"] = self._epsilon(done)  # a row that has already been returned
        measurement.beside = {"privacy": self.row}
        return True

    @override
    def columns(self, exchange: Exchange, uplinks: Uplinks | None) -> Row:
        if uplinks is None:  # nothing is released, at the same privacy cost
            self.note(exchange.round_, self.clip)
        revealing = ["train_loss"]
        revealing += ["rounding_up"] if exchange.rounding is not None else []
        revealing += ["train_metrics"] if exchange.metrics else []
        return {**dict.fromkeys(revealing), "privacy": self.row}  # no noise covers these

    def note(self, round_: int, clip: float) -> None:
        """Record the ledger's figures for a round with this clip."""
        self.row = {
            "epsilon": self._epsilon(round_),
            "delta": self.mechanism.delta,
            "noise_multiplier": self.mechanism.noise,
            "clip": clip,
            "next_clip": self.clip,
        }
