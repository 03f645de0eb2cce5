"""When a client can be asked: a pure function of seed, round, virtual time and client."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.rng import cohort_uniforms, hash_key


class Availability(ABC):
    """Who can be asked. Refusals start with the key: `schema` says where."""

    @abstractmethod
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        """Tell which clients can be asked in a round.

        Args:
            seed: Of the run.
            round_: From 1.
            now: Virtual seconds since the run began.
            clients: Ids, int64 [K].

        Returns:
            bool [K].
        """

    @staticmethod
    def rows() -> Mapping[str, type[Availability]]:
        """The table of names, for `schema`."""
        return AVAILABILITY


def _check_share(**values: float) -> None:
    for key, value in values.items():
        if not 0 < value <= 1:
            raise ConfigError(f"{key} is {value}; a number in (0, 1] is wanted")


@dataclass(frozen=True)
class Bernoulli(Availability):
    """Each client with probability ``chance``, drawn anew in each round."""

    chance: float

    def __post_init__(self) -> None:
        """Refuse what is no probability, and 0: nobody could ever be asked."""
        _check_share(chance=self.chance)

    @override
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        key = hash_key(seed, "system/available", round_)
        return cohort_uniforms(key, clients) < self.chance


@dataclass(frozen=True)
class Diurnal(Availability):
    """A client has its own hours: say, while its phone charges at night.

    Attributes:
        share: Share of the day that these hours are.
        chance: Probability that it can be asked within them, drawn anew in each round.
        day: Virtual seconds of a day. The hours of clients begin evenly over it.
    """

    share: float
    chance: float = 1.0
    day: float = 86_400.0

    def __post_init__(self) -> None:
        """Refuse shares outside (0, 1] and a day without length."""
        _check_share(share=self.share, chance=self.chance)
        if not 0 < self.day < math.inf:
            raise ConfigError(f"day is {self.day}; a finite number of seconds above 0 is wanted")

    @override
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        begin = cohort_uniforms(hash_key(seed, "system/phase"), clients)
        within = (now / self.day - begin).remainder(1.0) < self.share
        return within & Bernoulli(self.chance).at(seed, round_, now, clients)


AVAILABILITY: dict[str, type[Availability]] = {
    "bernoulli": Bernoulli,
    "diurnal": Diurnal,
}
