"""When a client can be asked: a pure function of seed, round, virtual time and client."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.limits import Chance, Limited, Seconds
from fedraclora.rng import cohort_uniforms, hash_key


class Availability(Limited):
    """Who can be asked. Refusals start with the key: `schema` says where."""

    @abstractmethod
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        """Draw which clients can be asked in a round.

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


@dataclass(frozen=True)
class Bernoulli(Availability):
    """Each client with probability ``chance``, drawn anew in each round."""

    chance: Chance  # with 0, nobody could ever be asked

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

    share: Chance
    chance: Chance = 1.0
    day: Seconds = 86_400.0

    @override
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        begin = cohort_uniforms(hash_key(seed, "system/phase"), clients)
        within = (now / self.day - begin).remainder(1.0) < self.share
        return within & Bernoulli(self.chance).at(seed, round_, now, clients)


AVAILABILITY: dict[str, type[Availability]] = {"bernoulli": Bernoulli, "diurnal": Diurnal}
