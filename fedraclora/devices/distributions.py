"""Define how devices differ, and when clients are available.

A row of `DISTRIBUTIONS` is a quantile function: it maps one uniform number of a client to the
client's value, so that draws do not depend on which clients are drawn, or on their order. It only
uses operations whose bits do not depend on the position in a tensor; ``torch.pow`` is not among
them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le, Lt
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.limits import Chance, Limited, Positive, Seconds
from fedraclora.rng import cohort_uniforms, hash_key
from fedraclora.schema import Chosen


class Availability(Limited, Chosen):
    """Base of availability models. Errors start with the key: `schema` adds it."""

    @abstractmethod
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        """Draw which clients are available in a round.

        Args:
            seed: Of the run.
            round_: From 1.
            now: Virtual seconds since the run began.
            clients: Ids, int64 [K].

        Returns:
            bool [K].
        """

    @classmethod
    @override
    def rows(cls) -> Mapping[str, type[Availability]]:
        """The table of names, for `schema`."""
        return AVAILABILITY


@dataclass(frozen=True)
class Bernoulli(Availability):
    """Each client is available with probability ``chance``, drawn in each round."""

    chance: Chance  # with 0, no client could ever be asked

    @override
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        key = hash_key(seed, "system/available", round_)
        return cohort_uniforms(key, clients) < self.chance


@dataclass(frozen=True)
class Diurnal(Availability):
    """Each client is available at its own hours, for example while its phone charges at night.

    Attributes:
        share: Length of these hours as a share of the day.
        chance: Probability of being available within them, drawn in each round.
        day: Virtual seconds of a day. The starts of the clients' hours are uniform over it.
    """

    share: Chance
    chance: Chance = 1.0
    day: Seconds = 86_400.0

    @override
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        begin = cohort_uniforms(hash_key(seed, "system/phase"), clients)
        within = (now / self.day - begin).remainder(1.0) < self.share
        return within & Bernoulli(self.chance).at(seed, round_, now, clients)


AVAILABILITY: dict[str, type[Availability]] = {"bernoulli": Bernoulli, "diurnal": Diurnal}


class Distribution(Limited, Chosen):
    """Base of distributions of positive numbers. Errors start with the key: `schema` adds it."""

    @abstractmethod
    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """Map uniform numbers in (0, 1) to values, float64 of the same shape."""

    @classmethod
    @override
    def rows(cls) -> Mapping[str, type[Distribution]]:
        """The table of names, for `schema`."""
        return DISTRIBUTIONS


@dataclass(frozen=True)
class Constant(Distribution):
    """The same ``value`` for every client."""

    value: Positive

    @override
    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        return torch.full_like(u, self.value)


@dataclass(frozen=True)
class UniformSpread(Distribution):
    """Uniform between ``low`` and ``high``."""

    low: Positive
    high: Positive

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high < self.low:
            raise ConfigError(f"high={self.high}: expected low ({self.low}) or more")

    @override
    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        return self.low + (self.high - self.low) * u


@dataclass(frozen=True)
class LogNormal(Distribution):
    """``median * exp(sigma z)``, z standard normal: two thirds within a factor of exp(sigma)."""

    median: Positive
    # Beyond 10, values exceed float64.
    sigma: Annotated[float, Ge(0), Le(10)]

    @override
    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        return self.median * torch.exp(self.sigma * torch.special.ndtri(u))


@dataclass(frozen=True)
class Pareto(Distribution):
    """``least`` or more, with P(X > x) = (least / x)^shape: a few clients are far above others."""

    least: Positive
    shape: Annotated[float, Ge(0.1), Lt(math.inf)]  # below, tails exceed float64

    @override
    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        return self.least * torch.exp(-torch.log(1 - u) / self.shape)


@dataclass(frozen=True)
class Choice(Distribution):
    """One of ``values``, with the ``probabilities`` at the same positions; None = equal."""

    values: list[Positive]
    probabilities: list[float] | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.values:
            raise ConfigError("values=[]: expected at least one number")
        if self.probabilities is None:
            return
        if len(self.probabilities) != len(self.values):
            raise ConfigError(
                f"probabilities has {len(self.probabilities)} numbers, but values has "
                f"{len(self.values)}, expected one for each"
            )
        total = math.fsum(self.probabilities)
        if not min(self.probabilities) >= 0 or not math.isclose(total, 1.0, abs_tol=1e-6):
            raise ConfigError(
                f"probabilities is {self.probabilities}, of sum {total:g}; numbers from 0 on that "
                "add up to 1 are needed"
            )

    @override
    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        count = len(self.values)
        shares = [1 / count] * count if self.probabilities is None else self.probabilities
        bounds = torch.tensor(shares, dtype=torch.float64).cumsum(0)
        # The last bound is 1 up to rounding; a value of probability 0 has an empty interval.
        place = torch.searchsorted(bounds / bounds[-1], u, right=True)
        return torch.tensor(self.values, dtype=torch.float64)[place]


DISTRIBUTIONS: dict[str, type[Distribution]] = {
    "constant": Constant,
    "uniform": UniformSpread,
    "lognormal": LogNormal,
    "pareto": Pareto,
    "choice": Choice,
}
