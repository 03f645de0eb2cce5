"""Numbers of samples and classes of clients, computed on demand so that nothing is stored.

All clients share tables of sample numbers and class distributions; random words of (seed, client,
position) index them. A look-up gives the same bits in any batch; arithmetic whose rounding depends
on the position in a vector would not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedraclora.compatibility import Feature, Part
from fedraclora.data.clients import ClientData
from fedraclora.data.samples import TensorContainer
from fedraclora.limits import OneOf
from fedraclora.rng import position_bits

SizeLaw = Annotated[str, OneOf(("constant", "lognormal", "pareto"))]
OWN = (1 << 32) - 1  # the position whose random words belong to the client, not to a sample
QUANTILES = 1024
MIX_NUMBERS = 1 << 20  # entries in the table of class distributions, over all classes


def uneven_sizes(group: str) -> Callable[[Part], Part]:
    """Declare of a function that its clients may have sizes that are not equal, with a spread."""
    return Feature(
        f"{group}.sizes=lognormal or pareto",
        take="sizes that are not constant (lognormal, pareto)",
        reads=(f"{group}.spread",),
    ).where(lambda it: it["sizes"] != "constant")


def pick(words: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Map words of 32 random bits to numbers from 0 to ``count - 1`` (below 2^31)."""
    return (words * count) >> 32


@dataclass(frozen=True)
class ClientLaw(TensorContainer):
    """Draw the number of samples and the class distribution of each client.

    Attributes:
        key: Key of all draws (`fedraclora.rng.hash_key`).
        clients: Size of the population.
        quantiles: Numbers of samples, int64 [Q]; each is equally likely.
        mixes: Class distributions, int64 [M, classes - 1]; each is equally likely. Class c has the
            words from bound c - 1 up to bound c, out of 2^32.
    """

    key: int
    clients: int
    quantiles: torch.Tensor
    mixes: torch.Tensor

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Count the samples of each client: int64 [K]."""
        own = position_bits(self.key, clients, torch.full_like(clients, OWN)[:, None])[:, 0]
        return self.quantiles[pick(own[:, 0], len(self.quantiles))]

    def draw(
        self, clients: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw the classes of samples.

        Args:
            clients: Ids, int64 [K].
            positions: Positions of samples in their client, int64 [K, b].

        Returns:
            Classes, int64 [K, b]; three more random words of each sample [K, b, 3]; two more of
            each client [K, 2].
        """
        places = torch.cat([positions, torch.full_like(clients, OWN)[:, None]], dim=1)
        words = position_bits(self.key, clients, places)
        words, own = words[:, :-1], words[:, -1]
        mixes = self.mixes[pick(own[:, 1], len(self.mixes))]
        classes = torch.searchsorted(mixes, words[..., 0].contiguous(), right=True)
        return classes, words[..., 1:], own[:, 2:]


class LawClientData(TensorContainer, ClientData):
    """Base of client data whose number of clients and sizes follow a law."""

    law: ClientLaw

    @property
    @override
    def num_clients(self) -> int:
        return self.law.clients

    @override
    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        return self.law.sizes(clients)


def class_mixes(
    rng: np.random.Generator, shares: npt.NDArray[np.float64], alpha: float | None
) -> torch.Tensor:
    """Draw the table of the clients' class distributions, as `ClientLaw` reads it.

    Args:
        rng: Random generator.
        shares: Mean share of each class over the clients [classes], positive, of sum 1.
        alpha: Concentration of the Dirichlet distribution, per class: small is skewed, large is
            even; None gives all clients the mean.

    Returns:
        int64 [mixes, classes - 1]: up to 2^14 of them.
    """
    mean = np.asarray(shares, dtype=np.float64)[None]
    if alpha is not None:
        count = max(1, min(1 << 14, MIX_NUMBERS // mean.size))
        mean = rng.dirichlet(alpha * mean.size * mean[0], size=count)
    bounds = np.minimum(np.cumsum(mean, axis=1)[:, :-1], 1.0) * 2.0**32
    return torch.from_numpy(bounds.astype(np.int64))


def size_quantiles(samples: int, sizes: str, spread: float) -> torch.Tensor:
    """Return the table of the clients' sample counts, as `ClientLaw` reads it.

    Args:
        samples: The median.
        sizes: ``constant``, ``lognormal`` (``spread``: deviation of the logarithm) or ``pareto``
            (``spread``: inverse of the tail's exponent).
        spread: How unequal clients are; 0 makes all sizes equal.

    Returns:
        int64 [1024], each at least 1.
    """
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    factor = np.ones(QUANTILES)
    if sizes == "lognormal":
        factor = np.exp(spread * np.array([NormalDist().inv_cdf(q) for q in levels]))
    elif sizes == "pareto":
        factor = (2 * (1 - levels)) ** -spread
    return torch.from_numpy(np.maximum(1, np.rint(samples * factor)).astype(np.int64))
