"""Client-level differential privacy: clip and noise the sums that a round releases.

    S~ = sum_k clip(update_k, C) + z C N(0, I);   mean update = S~ / (q N)

Each of N clients takes part with probability q, by a secret random draw (Poisson sampling). Its
update is the difference of its upload from the start, one vector of norm at most C. All clients
have the same weight, and the denominator is the expected number of clients, not the actual number.
So adding or removing one client moves the sum by at most C.

The means of clients' metrics get independent noise:

    c_k = (((m_k - low) / (high - low) - 1/2)_metrics, 1/2)
    S~ = sum_k c_k + z sqrt(M + 1)/2 N(0, I);   mean = low + (high - low) (1/2 + S~ / n)

Each metric m is clipped into its range [low, high]. Each of the M + 1 numbers of c_k is therefore
at most 1/2 in size, and the norm of c_k at most sqrt(M + 1)/2, which bounds how far one client
moves the sum. The last number counts the clients that replied. If twice its noisy sum is (rounded)
below the least number of clients, no mean is released: the decision uses a noisy count, since the
true count would be a further release. A missing reply or metric (NaN) counts as 0, the middle of
the range, which only makes c_k smaller. n is fixed: the expected number of clients. A release is
therefore a Gaussian mechanism of noise multiplier z for every M.

The clients that measure are drawn independently of those that train, and so is the noise: training
and measuring in a round are two subsampled mechanisms in sequence.

References:
    McMahan et al., *Learning differentially private recurrent language models*, arXiv 1710.06963;
    Andrew et al., *Differentially private learning with adaptive clipping*, arXiv 1905.03871.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.errors import ConfigError
from fedraclora.limits import Inner, Limited, Positive
from fedraclora.privacy.accountant import Releases, epsilon, noise_for
from fedraclora.privacy.secagg import FEW
from fedraclora.privacy.secret import Secret

UNCOVERED = "no noise covers what it tells of them"
# Rounding to the precision of the message changes the norm of a clipped update by a few last bits.
NORM_SLACK = 1 - 1e-5


@dataclass(frozen=True)
class Privacy(Limited, group="privacy"):
    """No differential privacy: data stay with their clients."""

    name: ClassVar[str] = "none"


@Feature(
    "privacy=client_level",
    instead="privacy=none",
    avoids={
        "simulated devices": "privacy samples the clients of each round itself",
        "another round step that needs each client's update": UNCOVERED,
        "a round step of yours with first=True": UNCOVERED,
        "an aggregator other than mean": (
            "the noise is made for the mean, whose sensitivity is known"
        ),
        "a method that needs each client's update": "only the noisy mean is released",
        "a method that sends numbers that it never trains": (
            "noise is added to all sent numbers, and these must not change"
        ),
        "aggregation_weights=samples": "the noise assumes equal weights",
        "compression.uplink=eden1": (
            "quantization makes an update a quarter longer, and clipping then cuts off a fifth"
        ),
        "clients that start from different factors": (
            "the mean of their updates has no common start"
        ),
        "fewer measuring clients than evaluate.min_clients": (
            "metrics of so few clients are not released"
        ),
        "two exchanges in a round": ("the privacy account covers one exchange in a round"),
    },
)
@dataclass(frozen=True)
class ClientLevel(Privacy):
    """Add client-level differential privacy at the server. Needs aggregation_weights=uniform.

    Attributes:
        clip: C, the largest norm of an update; with ``quantile`` that of the first round.
        noise_multiplier: z, the noise of a round in units of C; or None, for ``target_epsilon``.
        target_epsilon: Epsilon of all rounds together, from which the noise is computed.
        delta: Probability with which epsilon may not hold; below 1 / N.
        quantile: Share of clients whose updates should be shorter than C, which is adapted in each
            round (adaptive clipping); None: C is constant.
        clip_rate: Rate of adaptation: C <- C exp(-clip_rate (share - quantile)).
        count_noise: Standard deviation of the noise on the number of shorter updates; None: a
            twentieth of the expected clients of a round.
        measure_noise: Noise multiplier of clients' metrics (evaluate.clients).
        measure_bound: Largest value of a metric that has no bound of its own, such as a loss.
    """

    name: ClassVar[str] = "client_level"

    clip: Positive = 1.0
    noise_multiplier: Positive | None = 1.0
    target_epsilon: Positive | None = None
    delta: Inner = 1e-5
    quantile: Inner | None = None
    clip_rate: Positive = 0.2
    count_noise: Positive | None = None
    measure_noise: Positive | None = None
    measure_bound: Positive | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ConfigError(
                "privacy.noise_multiplier or privacy.target_epsilon is wanted, and not both"
            )

    @Feature(
        "privacy.quantile",
        instead="privacy.quantile=null",
        reads=("privacy.clip_rate", "privacy.count_noise"),
        avoids={
            "secure=secagg": "it needs the number of updates below the clip, not only their sum",
        },
    )
    def _adapts(self) -> bool:
        return self.quantile is not None

    def settle(self, clients: int, cohort: int, rounds: int, *beside: Releases) -> Mechanism:
        """Compute the noise of a run.

        Args:
            clients: N.
            cohort: q N.
            rounds: Rounds that share ``target_epsilon``.
            beside: Other releases that share it.

        Raises:
            ConfigError: If no noise meets the target, or adaptive clipping uses up all of it.
        """
        if self.delta * clients >= 1:
            raise ConfigError(
                f"privacy.delta={self.delta}, but with {clients} clients less than "
                f"{1 / clients:.3g} is wanted: else giving one of them away costs nothing"
            )
        sampling, noise = cohort / clients, self.noise_multiplier
        if noise is None and self.target_epsilon is not None:
            noise = noise_for(self.target_epsilon, sampling, max(1, rounds), self.delta, *beside)
        assert noise is not None  # noqa: S101  # one of the two is given
        if self.quantile is None:
            return Mechanism(sampling, cohort, noise, noise, self.delta)
        count = self.count_noise or cohort / 20
        # The two releases together cost as much as one with the noise `noise`.
        rest = noise**-2 - (2 * count) ** -2
        if rest <= 0:
            raise ConfigError(
                f"privacy.count_noise={count}, which alone costs as much as the noise "
                f"{noise:.4g} allows, expected above {noise / 2:.4g}, or a larger "
                "clients_per_round, or no quantile"
            )
        return Mechanism(sampling, cohort, noise, rest**-0.5, self.delta, count)

    def next_clip(self, clip: float, shorter: float, cohort: int) -> float:
        """Compute C for the next round from the (noisy) number of updates shorter than ``clip``."""
        if self.quantile is None:
            return clip
        share = min(1.0, max(0.0, shorter / cohort))
        return clip * math.exp(-self.clip_rate * (share - self.quantile))


@dataclass(frozen=True)
class Mechanism:
    """Hold the noise of a run.

    Attributes:
        sampling: q.
        cohort: The fixed denominator q N.
        noise: Noise multiplier of one release that costs as much as a round.
        update_noise: Noise on the sum of updates, in units of C.
        delta: Delta of the guarantee.
        count_noise: Noise on the number of shorter updates; None if it is not released.
    """

    sampling: float
    cohort: int
    noise: float
    update_noise: float
    delta: float
    count_noise: float | None = None

    def epsilon(self, rounds: int, *beside: Releases) -> float:
        """Compute epsilon after ``rounds`` rounds and all other releases."""
        return epsilon(self.noise, self.sampling, rounds, self.delta, *beside)

    def sample(self, secret: Secret, round_: int, clients: int) -> torch.Tensor:
        """Draw the clients of a round independently; ids ascending, int64."""
        return secret.chosen(clients, self.sampling, "cohort", round_)

    def noisy_sum(
        self, total: torch.Tensor, clip: float, secret: Secret, round_: int
    ) -> torch.Tensor:
        """Add noise to a sum of updates, float64 [P].

        The draw depends on the round, the sum and the clip, so that another sum of the same round
        (in a run resumed from a checkpoint with other replies) gets independent noise.
        """
        about = torch.cat([total, torch.tensor([clip], dtype=torch.float64)])
        noise = secret.normals(len(total), "sum", round_, about)
        return total + self.update_noise * clip * noise

    def noisy_count(self, shorter: int, came: int, secret: Secret, round_: int) -> float:
        """Add noise to the number of shorter updates.

        The number is half of the expected clients plus a sum of +1/2 and -1/2, which one client
        moves by 1/2.
        """
        centred = shorter - came / 2
        words = torch.tensor([shorter, came], dtype=torch.float64)
        noise = float(secret.normals(1, "count", round_, words))
        return centred + (self.count_noise or 0.0) * noise + self.cohort / 2


PRIVACIES: dict[str, type[Privacy]] = {kind.name: kind for kind in (Privacy, ClientLevel)}


Floats = npt.NDArray[np.float64]
SHARES = {"accuracy", "token_accuracy", "f1", "f1_micro", "f1_macro", "auc", "mean_iou"}
CORRELATIONS = {"matthews", "pearson", "spearman"}


@dataclass(frozen=True)
class NoisyMeans:
    """Add noise to clients' metrics.

    Attributes:
        noise: z.
        sampling: Probability of each client to measure.
        count: n.
        ranges: Low and high of each metric, by name.
        least: Nothing is released if the noisy number of clients is lower.
    """

    noise: float
    sampling: float
    count: int
    ranges: Mapping[str, tuple[float, float]]
    least: int = 0

    @classmethod
    def of(
        cls,
        config: ClientLevel,
        metrics: Mapping[str, str],
        count: int,
        clients: int,
        least: int = 0,
    ) -> NoisyMeans:
        """Create it from the settings of a run.

        Args:
            config: Settings with noise and bound.
            metrics: Name of the metric, which determines the range, by its name in the ledger.
            count: Expected number of clients that measure.
            clients: Number of all clients.
            least: Nothing is released for fewer clients.

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
        return cls(config.measure_noise, count / clients, count, ranges, least)

    def sample(self, secret: Secret, round_: int, clients: int) -> torch.Tensor:
        """Draw the clients that measure after a round; ids ascending, int64."""
        return secret.chosen(clients, self.sampling, "measurers", round_)

    def releases(self, count: int) -> Releases:
        """Describe a number of measurements for the accountant."""
        return self.noise, self.sampling, count

    def summed(self, values: Mapping[str, Floats], came: int) -> torch.Tensor:
        """Add up c_k over clients, float64 [M + 1].

        Args:
            values: Value of each client [K], by metric.
            came: Number of clients that replied.
        """
        total = []
        for name, each in values.items():
            low, high = self.ranges[name]
            own = np.clip(each[~np.isnan(each)], low, high)
            total.append(float(((own - low) / (high - low) - 0.5).sum()))
        return torch.tensor([*total, came / 2], dtype=torch.float64)

    def released(
        self, values: Mapping[str, Floats], came: int, secret: Secret, round_: int
    ) -> dict[str, object]:
        """Compute the noisy ``mean`` of each metric, and its noise's standard deviation.

        If too few clients (by the noisy count) replied, there is only ``withheld``, which says so.
        """
        total = self.summed(values, came)
        deviation = self.noise * math.sqrt(len(total)) / 2
        noisy = total + deviation * secret.normals(len(total), "measured", round_, total)
        *parts, counted = noisy.tolist()
        if round(2 * counted) < self.least:
            return {"withheld": FEW.format(self.least)}
        found = dict[str, object]()
        for name, part in zip(values, parts, strict=True):
            low, high = self.ranges[name]
            mean = low + (high - low) * (0.5 + part / self.count)
            found[name] = {"mean": mean, "noise": (high - low) * deviation / self.count}
        return found
