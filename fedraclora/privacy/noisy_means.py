"""The means of what clients measure, with noise: client-level privacy of metrics.

    c_k = ((m_k - low) / (high - low) - 1/2)_metrics;   S~ = sum_k c_k + z sqrt(M)/2 N(0, I)
    mean = low + (high - low) (1/2 + S~ / n)

Each metric m is clipped into its range [low, high]. So each of the M numbers of c_k is at most 1/2
in size, and the norm of c_k at most sqrt(M)/2: by so much the sum moves at most when a client is
added or removed. A client that sends nothing, or a metric without value (NaN), counts as 0, the
middle of the range, which only makes it smaller. n is fixed: the clients that are expected. So a
release is a Gaussian mechanism of noise multiplier z, whatever M is.

Who measures is drawn by coins of their own, which tell nothing of who trains, and the noise is
another, too: training and measuring of a round are two subsampled mechanisms one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.errors import ConfigError
from fedraclora.privacy.accountant import Releases
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secret import Secret

Floats = npt.NDArray[np.float64]
SHARES = {"accuracy", "token_accuracy", "f1", "f1_micro", "f1_macro", "auc", "mean_iou"}
CORRELATIONS = {"matthews", "pearson", "spearman"}


@dataclass(frozen=True)
class NoisyMeans:
    """The noise on what clients measure.

    Attributes:
        noise: z.
        sampling: With which probability each client measures.
        count: n.
        ranges: Low and high of each metric, by name.
    """

    noise: float
    sampling: float
    count: int
    ranges: Mapping[str, tuple[float, float]]

    @classmethod
    def of(
        cls, config: ClientLevel, metrics: Mapping[str, str], count: int, clients: int
    ) -> NoisyMeans:
        """Make it of the settings of a run.

        Args:
            config: Has noise and bound.
            metrics: By the name that the ledger has the name of the metric, whose range it has.
            count: How many clients measure, as is expected.
            clients: Of how many.

        Raises:
            ConfigError: Without a noise multiplier, or a bound where a metric needs one.
        """
        if config.measure_noise is None:
            raise ConfigError(
                "evaluate.clients has clients measure, which under privacy=client_level needs "
                "noise of its own: set privacy.measure_noise, its noise multiplier, or "
                "evaluate.clients=none"
            )
        ranges = {}
        for name, metric in metrics.items():
            low, high = -1.0 if metric in CORRELATIONS else 0.0, config.measure_bound
            if metric in SHARES | CORRELATIONS:
                high = 1.0
            if high is None:
                raise ConfigError(
                    f"clients measure {name}, which has no greatest value: set "
                    "privacy.measure_bound, to which each client's value is clipped"
                )
            ranges[name] = low, high
        return cls(config.measure_noise, count / clients, count, ranges)

    def drawn(self, secret: Secret, round_: int, clients: int) -> torch.Tensor:
        """Draw who measures after a round; ids ascending, int64."""
        if self.sampling >= 1:
            return torch.arange(clients)
        coins = secret.uniforms(clients, "measurers", round_)
        return torch.nonzero(coins < self.sampling).flatten()

    def releases(self, count: int) -> Releases:
        """Say what a number of measurements is to the accountant."""
        return self.noise, self.sampling, count

    def summed(self, values: Mapping[str, Floats]) -> torch.Tensor:
        """Add up c_k over clients, float64 [M].

        Args:
            values: Of each client [K], by metric.
        """
        total = []
        for name, each in values.items():
            low, high = self.ranges[name]
            own = np.clip(each[~np.isnan(each)], low, high)
            total.append(float(((own - low) / (high - low) - 0.5).sum()))
        return torch.tensor(total, dtype=torch.float64)

    def released(
        self, values: Mapping[str, Floats], secret: Secret, round_: int
    ) -> dict[str, dict[str, float]]:
        """Compute the noisy ``mean`` of each metric, and the standard deviation of its noise."""
        total = self.summed(values)
        deviation = self.noise * math.sqrt(len(total)) / 2
        noisy = total + deviation * secret.normals(len(total), "measured", round_, total)
        found = {}
        for name, part in zip(values, noisy.tolist(), strict=True):
            low, high = self.ranges[name]
            mean = low + (high - low) * (0.5 + part / self.count)
            found[name] = {"mean": mean, "noise": (high - low) * deviation / self.count}
        return found
