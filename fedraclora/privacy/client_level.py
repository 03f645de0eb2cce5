"""Client-level differential privacy: what a round releases of its clients, and at what price.

    S~ = sum_k clip(update_k, C) + z C N(0, I);   mean update = S~ / (q N)

Each of N clients takes part with probability q, by a coin that nobody else can foresee (Poisson
sampling). Its update is the difference of all that it sends from where that started, one vector of
norm at most C. All count alike, and the denominator is the expected number of clients, not the
number that came. So adding or removing one client moves the sum by at most C.

The means of what clients measure get noise of their own:

    c_k = (((m_k - low) / (high - low) - 1/2)_metrics, 1/2)
    S~ = sum_k c_k + z sqrt(M + 1)/2 N(0, I);   mean = low + (high - low) (1/2 + S~ / n)

Each metric m is clipped into its range [low, high]. So each of the M + 1 numbers of c_k is at most
1/2 in size, and the norm of c_k at most sqrt(M + 1)/2: by so much the sum moves at most when a
client is added or removed. The last number counts who has sent something. If twice its noisy sum is
(rounded) below the least number of clients, no mean is released: that decides on what noise covers
already, where the true number would be one more release. A client that sends nothing, or a metric
without value (NaN), counts as 0, the middle of the range, which only makes it smaller. n is fixed:
the clients that are expected. So a release is a Gaussian mechanism of noise multiplier z, whatever
M is.

Who measures is drawn by coins of their own, which tell nothing of who trains, and the noise is
another, too: training and measuring of a round are two subsampled mechanisms one after the other.

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
# Rounding to the precision of the wire moves the norm of a shortened update by a few last bits.
NORM_SLACK = 1 - 1e-5


@dataclass(frozen=True)
class Privacy(Limited, group="privacy"):
    """No privacy beyond that data stay with their clients."""

    name: ClassVar[str] = "none"


@Feature(
    "privacy=client_level",
    instead="privacy=none",
    avoids={
        "system": "privacy draws its cohorts itself",
        "another step that looks at single updates": UNCOVERED,
        "a step of a program's own that stands before all others": UNCOVERED,
        "another aggregator than mean": (
            "privacy takes the mean itself, whose sensitivity it knows"
        ),
        "a method that needs each client's own update": "privacy gives the noisy mean alone",
        "a method some of whose numbers are never trained": (
            "noise is added to all numbers that are sent, and these must stay as they are"
        ),
        "aggregation_weights=samples": "under privacy clients count alike",
        "compression.uplink=eden1": (
            "rounding lengthens an update by a quarter, and of the clipped mean a fifth is cut away"
        ),
        "other factors to start from at each client": "their mean has no one start",
        "too few clients that measure": (
            "nothing is released of fewer clients than evaluate.min_clients"
        ),
        "a method that asks twice in a round": "privacy is accounted for one exchange a round",
    },
)
@dataclass(frozen=True)
class ClientLevel(Privacy):
    """Client-level differential privacy: the server adds noise. Needs aggregation_weights=uniform.

    Attributes:
        clip: C, the greatest norm of an update; with ``quantile`` that of the first round.
        noise_multiplier: z, the noise of a round in units of C; or None, for ``target_epsilon``.
        target_epsilon: What all rounds together may cost: the noise is found from it.
        delta: With which probability epsilon may not hold; below 1 / N.
        quantile: Share of the clients whose updates should be shorter than C, which follows them
            from round to round (adaptive clipping); None: C stays.
        clip_rate: By how much: C <- C exp(-clip_rate (share - quantile)).
        count_noise: Standard deviation of the noise on the number of updates that were shorter;
            None: a twentieth of the expected cohort.
        measure_noise: Noise multiplier of what clients measure (evaluate.clients).
        measure_bound: The greatest value of a metric that has no bound of its own, such as a loss.
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
        adapts = {"clip_rate": ClientLevel.clip_rate, "count_noise": ClientLevel.count_noise}
        for key, default in adapts.items():
            if self.quantile is None and getattr(self, key) != default:
                raise ConfigError(
                    f"privacy.{key} is {getattr(self, key)}, but without privacy.quantile the clip "
                    f"stays as it is; set a quantile, or leave {key} at {default}"
                )
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ConfigError(
                "privacy.noise_multiplier or privacy.target_epsilon is wanted, and not both"
            )

    @Feature(
        "privacy.quantile",
        instead="privacy.quantile=null",
        avoids={
            "secure=secagg": "it counts short updates one by one, which a sum hides",
        },
    )
    def _adapts(self) -> bool:
        return self.quantile is not None

    def settle(self, clients: int, cohort: int, rounds: int, *beside: Releases) -> Mechanism:
        """Fix the noise of a run.

        Args:
            clients: N.
            cohort: q N.
            rounds: Over which ``target_epsilon`` is spent.
            beside: What else it is spent on.

        Raises:
            ConfigError: If no noise keeps to the target, or adaptive clipping eats all of it.
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
        # The two releases together cost what one with the noise `noise` does.
        rest = noise**-2 - (2 * count) ** -2
        if rest <= 0:
            raise ConfigError(
                f"privacy.count_noise={count}, which alone costs as much as the noise "
                f"{noise:.4g} allows, expected above {noise / 2:.4g}, or a larger cohort, or no "
                "quantile"
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
    """The noise of a run.

    Attributes:
        sampling: q.
        cohort: The fixed denominator q N.
        noise: What a round costs is what one release with this noise multiplier does.
        update_noise: Of the sum of updates, in units of C.
        delta: Of the guarantee.
        count_noise: Of the number of short updates; None where it is not released.
    """

    sampling: float
    cohort: int
    noise: float
    update_noise: float
    delta: float
    count_noise: float | None = None

    def epsilon(self, rounds: int, *beside: Releases) -> float:
        """Compute epsilon after ``rounds`` rounds and what else was released."""
        return epsilon(self.noise, self.sampling, rounds, self.delta, *beside)

    def drawn(self, secret: Secret, round_: int, clients: int) -> torch.Tensor:
        """Draw the cohort of a round: each client by its own coin; ids ascending, int64."""
        return secret.chosen(clients, self.sampling, "cohort", round_)

    def noisy_sum(
        self, total: torch.Tensor, clip: float, secret: Secret, round_: int
    ) -> torch.Tensor:
        """Add noise to a sum of updates, float64 [P].

        The noise is drawn from the round, the sum and the clip: another sum of the same round (a
        run that goes on from a checkpoint and meets other replies) so gets independent noise.
        """
        about = torch.cat([total, torch.tensor([clip], dtype=torch.float64)])
        noise = secret.normals(len(total), "sum", round_, about)
        return total + self.update_noise * clip * noise

    def noisy_count(self, shorter: int, came: int, secret: Secret, round_: int) -> float:
        """Add noise to the number of short updates.

        As the sum of +1/2 and -1/2, which one client moves by 1/2, and half of the expected cohort.
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
    """The noise on what clients measure.

    Attributes:
        noise: z.
        sampling: With which probability each client measures.
        count: n.
        ranges: Low and high of each metric, by name.
        least: Clients below whose number, as the noise has it, nothing is released.
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
        """Make it of the settings of a run.

        Args:
            config: Has noise and bound.
            metrics: By the name that the ledger has the name of the metric, whose range it has.
            count: How many clients measure, as is expected.
            clients: Of how many.
            least: Clients below whose number nothing is released.

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

    def drawn(self, secret: Secret, round_: int, clients: int) -> torch.Tensor:
        """Draw who measures after a round; ids ascending, int64."""
        return secret.chosen(clients, self.sampling, "measurers", round_)

    def releases(self, count: int) -> Releases:
        """Say what a number of measurements is to the accountant."""
        return self.noise, self.sampling, count

    def summed(self, values: Mapping[str, Floats], came: int) -> torch.Tensor:
        """Add up c_k over clients, float64 [M + 1].

        Args:
            values: Of each client [K], by metric.
            came: Clients that have sent something.
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
        """Compute the noisy ``mean`` of each metric, and the standard deviation of its noise.

        ``withheld`` in their place says that, but for noise, too few clients have sent something.
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
