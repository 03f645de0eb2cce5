"""Client-level differential privacy in the rounds of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedraclora.aggregation.base import AggregationContext, rows_of, starts
from fedraclora.aggregation.statistics import shortened
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.privacy.client_level import WITHIN, ClientLevel, Mechanism
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.method import Method
from fedraclora.protocol.uplinks import Uplinks, weighted_sum
from fedraclora.run.ledger import number
from strategies.server.loop import LoopConfig
from strategies.server.rows import Row


@dataclass
class PrivateRounds:
    """Draws cohorts, adds noise and keeps the account.

    Attributes:
        config: Clip, noise, target.
        mechanism: The noise of the run.
        secret: Where coins and noise come from; `open` fetches it from the run folder.
        clip: C of the next round.
        row: What the ledger says of the round that `treat` was last called in.
    """

    config: ClientLevel
    mechanism: Mechanism
    secret: Secret | None
    clip: float
    row: Row

    @classmethod
    def begin(
        cls, config: ClientLevel, method: Method, loop: LoopConfig, secret: Secret | None
    ) -> PrivateRounds:
        """Fix the noise of a run.

        Raises:
            ConfigError: If the method or the weights do not go with it.
        """
        if not method.traits.linear:
            raise ConfigError(
                "privacy=client_level gives the method the noisy mean only, but this one needs "
                "each client's own update; choose another method, or privacy=none"
            )
        if loop.weights != "uniform":
            raise ConfigError(
                f"weights is {loop.weights}, but under privacy=client_level clients count alike; "
                "set weights=uniform"
            )
        mechanism = config.settle(loop.clients, loop.cohort, loop.rounds)
        return cls(config, mechanism, secret, config.clip, {})

    def open(self, folder: Path | None, rows: Sequence[Row]) -> None:
        """Fetch key and clip of a run that begins, or goes on after the last of ``rows``."""
        last, begun = rows[-1] if rows else {}, len(rows) > 1
        if begun:
            self.clip = number(last, "privacy", "next_clip")
            if not self.clip > 0:
                raise CheckpointError("the ledger's last row has no privacy.next_clip")
        if self.secret is None:
            self.secret = Secret() if folder is None else Secret.of_folder(folder, resume=begun)

    @property
    def key(self) -> Secret:
        """The secret, once it is there."""
        if self.secret is None:
            raise CheckpointError("a private run was not opened: nothing may be drawn yet")
        return self.secret

    def ask(self, round_: int, clients: int) -> torch.Tensor:
        """Draw whom a round asks; it may be nobody."""
        return self.mechanism.drawn(self.key, round_, clients)

    def treat(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        """Give the noisy mean of updates; those that are too long are shortened here, too."""
        start = starts(setting, got)
        if start.dim() > 1:
            raise ConfigError(
                "privacy=client_level needs all clients to start alike, but this method starts "
                "each from its own; choose another method, or privacy=none"
            )
        clip, K = self.clip, len(got.clients)
        if not K:
            total, norms = torch.zeros_like(start), torch.zeros(0)
        elif got.stacked is None:  # a secure sum: clients alone have shortened what they sent
            total, norms = got.sum() - start * K, torch.zeros(0)
        else:
            rows = rows_of(got)
            norms = torch.linalg.vector_norm(rows - start, dim=1)
            ones = torch.ones(K, dtype=torch.float64)
            total = weighted_sum(shortened(rows, start, clip) - start, ones, got.places)
        noisy = self.mechanism.noisy_sum(total, clip, self.key, setting.round_)
        if self.mechanism.count_noise is not None:
            short = int((norms < clip * WITHIN).sum())
            count = self.mechanism.noisy_count(short, K, self.key, setting.round_)
            self.clip = self.config.next_clip(clip, count, self.mechanism.cohort)
        self.note(setting.round_, clip)
        mean = start + noisy / self.mechanism.cohort
        return replace(got, stacked=None, summed=mean, denominator=1.0)

    def note(self, round_: int, clip: float) -> None:
        """Write what the ledger says of a round whose clip was ``clip``."""
        self.row = {
            "epsilon": self.mechanism.epsilon(round_),
            "delta": self.mechanism.delta,
            "noise_multiplier": self.mechanism.noise,
            "clip": clip,
            "next_clip": self.clip,
        }
