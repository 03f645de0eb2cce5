"""Which clients take part in a round, and with which weight."""

from __future__ import annotations

import torch

from fedraclora.errors import ConfigError
from fedraclora.rng import generator

WEIGHTINGS = ("examples", "uniform")


def check_cohort(cohort: int, clients: int) -> None:
    """Reject a cohort that cannot be drawn.

    Raises:
        ConfigError: If ``cohort`` is not in 1..clients.
    """
    if not 1 <= cohort <= clients:
        raise ConfigError(
            f"cohort is {cohort}, but there are {clients} clients (after empty ones are dropped); "
            f"choose 1 to {clients}"
        )


def draw_cohort(seed: int, round_: int, clients: int, cohort: int) -> torch.Tensor:
    """Draw the clients of a round uniformly without replacement.

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
    """Compute aggregation weights float64 [K]: the number of examples, or 1 for ``uniform``."""
    if weighting == "uniform":
        return torch.ones(len(samples), dtype=torch.float64)
    return samples.to(torch.float64)
