"""Clients made on demand, and a classification problem of such: nothing is stored.

What a client holds is a function of its id. How many samples it has, its mix of classes and its
samples are looked up in tables that all clients share, at places named by random words of (seed,
client, position). So a million clients cost what a thousand cost, a batch is made for all clients
of a chunk at once, and a look-up gives the same bits in any batch: arithmetic that rounds by its
place in a vector would not.

In the problem each class is a few Gaussian clouds, so that no linear model separates them. Client k
sees them through its own shift, in its own mix of classes, in its own number:

    c ~ mix_k,    x = (centre[c, m] + noise e + shift s_k) / norm,    m one of the clouds of c

with standard normal centres and s_k, e the sum of two rows of a shared table of normals, and
``norm`` such that each feature has variance 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge
from typing_extensions import override

from fedraclora.data.clients import ClientData
from fedraclora.data.dataset import FLOAT_TYPES, OF_RUN, Clients, DataSet, Dtype, classification
from fedraclora.data.samples import Movable, Samples
from fedraclora.limits import Count, NotNegative, OneOf, Positive, limited
from fedraclora.rng import generator, hash_key, position_bits

SizeLaw = Annotated[str, OneOf(("constant", "lognormal", "pareto"))]
OWN = (1 << 32) - 1  # the position whose random words are of the client, not of a sample
QUANTILES = 1024
MIX_NUMBERS = 1 << 20  # in the table of mixes, over all classes
POOL_NUMBERS = 1 << 21  # in the table of normals, over all features


def pick(words: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Turn words of 32 random bits into numbers from 0 to ``count - 1`` (below 2^31)."""
    return (words * count) >> 32


@dataclass(frozen=True)
class ClientLaw(Movable):
    """How many samples a client has, and of which classes.

    Attributes:
        key: Of all draws (`fedraclora.rng.hash_key`).
        clients: Size of the population.
        quantiles: Numbers of samples, int64 [Q]; each is a client's with the same chance.
        mixes: Mixes of classes, int64 [M, classes - 1]; each is a client's with the same chance.
            Class c has the words from bound c - 1 up to bound c, out of 2^32.
    """

    key: int
    clients: int
    quantiles: torch.Tensor
    mixes: torch.Tensor

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Number of samples of each client: int64 [K]."""
        own = position_bits(self.key, clients, torch.full_like(clients, OWN)[:, None])[:, 0]
        return self.quantiles[pick(own[:, 0], len(self.quantiles))]

    def draw(
        self, clients: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw the classes of samples.

        Args:
            clients: Ids, int64 [K].
            positions: Of samples in their client, int64 [K, b].

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


class OfLaw(Movable, ClientData):
    """Clients whose number and sizes are those of a law."""

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
    """Draw the table of the clients' mixes of classes, as `ClientLaw` reads it.

    Args:
        rng: Where the mixes are drawn from.
        shares: Mean share of each class over the clients [classes], positive, of sum 1.
        alpha: Concentration of the Dirichlet distribution of the mixes, per class: small is
            skewed, large is even; None gives all clients the mean.

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
    """Give the table of the clients' numbers of samples, as `ClientLaw` reads it.

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


@dataclass(frozen=True)
class Mixture(OfLaw):
    """Clients who draw from a mixture of Gaussian clouds.

    Attributes:
        law: Of sizes and classes.
        centres: Of the clouds, class by class [classes * clouds, features].
        clouds: Clouds of each class.
        pool: Normals [P, features], of which the sum of two rows has variance 1 / norm^2.
        noise, shift: Standard deviations of samples about their cloud and of clients' shifts.
    """

    law: ClientLaw
    centres: torch.Tensor
    clouds: int
    pool: torch.Tensor
    noise: float
    shift: float

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Make samples by position in the client: ids [K], positions [K, b] -> K * b rows."""
        classes, words, own = self.law.draw(clients, positions)
        cloud = classes * self.clouds + pick(words[..., 2], self.clouds)
        x = self.centres[cloud]
        # A product and then a sum, each rounded by itself: fused, they would round in another way
        # at the end of a vector than inside it.
        x += self._normals(words[..., :2]).mul_(self.noise)
        x += self._normals(own).mul_(self.shift)[:, None]
        return Samples({"x": x.flatten(0, 1)}, classes.flatten())

    @override
    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> None:
        """Samples are not padded."""

    def _normals(self, words: torch.Tensor) -> torch.Tensor:
        """Sum two rows of the pool: words [..., 2] -> [..., features]."""
        rows = pick(words, len(self.pool))
        return self.pool[rows[..., 0]].add_(self.pool[rows[..., 1]])


@limited("data")
def virtual(
    *,
    clients: Annotated[Clients, OF_RUN],
    samples: Count = 50,
    sizes: SizeLaw = "lognormal",
    spread: NotNegative = 0.5,
    features: Count = 32,
    classes: Annotated[int, Ge(2)] = 10,
    clouds: Count = 5,
    noise: NotNegative = 1.0,
    shift: NotNegative = 0.5,
    alpha: Positive | None = 0.5,
    held_out: Count = 2000,
    seed: int = 0,
    dtype: Dtype = "float32",
) -> DataSet:
    """Make a population of clients whose samples are a function of (seed, client, position).

    Training and test table hold one sample each of further clients, who never train: the test
    table measures the population, and the training table is set aside for what is done before the
    first round (pretraining, validation), not for the clients.

    Args:
        clients: Number of clients; memory does not depend on it.
        samples: Median number of samples of a client.
        sizes: ``constant``, ``lognormal`` (``spread``: deviation of the logarithm) or ``pareto``
            (``spread``: inverse of the tail's exponent).
        spread: How unequal clients are.
        features: Length of x.
        classes: Number of classes.
        clouds: Gaussian clouds of each class.
        noise: Standard deviation of a sample about its cloud; centres have 1 in each feature.
        shift: Standard deviation of the clients' shifts.
        alpha: Concentration of the clients' mixes of classes: small is skewed, large is even;
            None gives all clients all classes evenly.
        held_out: Samples of the test table; the training table has as many.
        seed: Seed of the problem; apart from the seed of the run.
        dtype: ``float32`` or ``float64``.

    Returns:
        Inputs ``"x"`` [held_out, features] and classes; ``parts`` are the clients.

    Raises:
        ConfigError: If a number is out of range, naming the key.
    """
    law = ClientLaw(
        hash_key(seed, "virtual", "clients"),
        clients,
        size_quantiles(samples, sizes, spread),
        class_mixes(generator(seed, "virtual", "mixes"), np.full(classes, 1 / classes), alpha),
    )
    norm = math.sqrt(1 + noise**2 + shift**2)
    rows = max(2, POOL_NUMBERS // features)
    pool = generator(seed, "virtual", "pool").standard_normal((rows, features))
    centres = generator(seed, "virtual", "centres").standard_normal((classes * clouds, features))
    population = Mixture(
        law,
        torch.from_numpy(centres / norm),
        clouds,
        torch.from_numpy(pool / (norm * math.sqrt(2))),
        noise,
        shift,
    ).to("cpu", FLOAT_TYPES[dtype])
    others = replace(population, law=replace(law, key=hash_key(seed, "virtual", "held out")))
    ids = torch.arange(2 * held_out)
    table = others.gather(ids, torch.zeros_like(ids)[:, None])
    data = classification(
        table.take(ids[:held_out]),
        table.take(ids[held_out:]),
        classes,
        {"source": "synthetic mixture, clients made on demand; train is a table beside them"},
    )
    return replace(data, parts=population, aside=(data.train, data.test))
