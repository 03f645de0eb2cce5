"""Sample the clients of a round, and compute their aggregation weights."""

from __future__ import annotations

import re
from fractions import Fraction

import torch

from fedraclora.errors import ConfigError
from fedraclora.rng import generator

SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
WEIGHTINGS = ("samples", "uniform")


def share_of(text: str) -> Fraction | None:
    """Parse a share of the clients, written as ``10%``; None if the text is not a share.

    Example:
        >>> share_of("12.5%"), share_of("0%"), share_of("half")
        (Fraction(1, 8), None, None)
    """
    found = SHARE.fullmatch(text)
    share = Fraction(found[1]) / 100 if found else Fraction(0)
    return share if 0 < share <= 1 else None


def cohort_size(clients_per_round: int | str, clients: int) -> int:
    """Return the number of clients in a round, from a number or a share of all (at least one).

    Example:
        >>> cohort_size("20%", 50), cohort_size("1%", 50), cohort_size(7, 50)
        (10, 1, 7)
    """
    if isinstance(clients_per_round, int):
        return clients_per_round
    return max(1, int((share_of(clients_per_round) or 0) * clients))


def check_cohort(cohort: int, clients: int) -> None:
    """Check that this number of clients can be sampled.

    Raises:
        ConfigError: If ``cohort`` is not in 1..clients.
    """
    if not 1 <= cohort <= clients:
        raise ConfigError(
            f"clients_per_round={cohort}, but there are {clients} clients (after empty ones "
            "are dropped); "
            f"choose 1 to {clients}"
        )


def draw_cohort(seed: int, round_: int, clients: int, cohort: int) -> torch.Tensor:
    """Sample the clients of a round uniformly without replacement.

    Args:
        seed: Of the run.
        round_: From 1.
        clients: Size of the population.
        cohort: Clients to draw.

    Returns:
        Ids in ascending order, int64 [cohort].

    Example:
        >>> draw_cohort(0, 1, 5, 5)
        tensor([0, 1, 2, 3, 4])
    """
    if cohort == clients:
        return torch.arange(clients)
    chosen = generator(seed, "cohort", round_).choice(clients, cohort, replace=False)
    return torch.from_numpy(chosen).sort().values


def client_weights(weighting: str, samples: torch.Tensor) -> torch.Tensor:
    """Compute aggregation weights float64 [K]: the number of samples, or 1 for ``uniform``."""
    if weighting == "uniform":
        return torch.ones(len(samples), dtype=torch.float64)
    return samples.to(torch.float64)
