"""Create clients on demand, and a classification problem with such clients.

A client's samples are a function of its id; nothing is stored. Its number of samples, its class
distribution and its samples are looked up in tables that all clients share; random words of (seed,
client, position) index them. A million clients therefore cost as much as a thousand, a batch is
created for all clients of a chunk at once, and a look-up gives the same bits in any batch;
arithmetic whose rounding depends on the position in a vector would not.

In the problem each class is a few Gaussian clouds, so that no linear model separates them. Client k
has its own shift, its own class distribution and its own number of samples:

    c ~ mix_k,    x = (centre[c, m] + noise e + shift s_k) / norm,    m one of the clouds of c

with standard normal centres and s_k, e the sum of two rows of a shared table of normals, and
``norm`` such that each feature has variance 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from typing_extensions import override

from fedraclora.data.client_law import (
    ClientLaw,
    LawClientData,
    SizeLaw,
    class_mixes,
    pick,
    size_quantiles,
    uneven_sizes,
)
from fedraclora.data.dataset import (
    FLOAT_TYPES,
    FROM_CLIENTS,
    NUMERIC,
    OF_RUN,
    Clients,
    DataSet,
    Dtype,
    classification,
)
from fedraclora.data.samples import Samples
from fedraclora.limits import Count, NotNegative, Positive, limited
from fedraclora.rng import generator, hash_key

POOL_NUMBERS = 1 << 21  # in the table of normals, over all features


@dataclass(frozen=True)
class Mixture(LawClientData):
    """Draw clients' samples from a mixture of Gaussian clouds.

    Attributes:
        law: Law of sizes and classes.
        centres: Centres of the clouds, class by class [classes * clouds, features].
        clouds: Clouds of each class.
        pool: Normals [P, features]; the sum of two rows has variance 1 / norm^2.
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
        """Create samples by position in the client: ids [K], positions [K, b] -> K * b rows."""
        classes, words, own = self.law.draw(clients, positions)
        cloud = classes * self.clouds + pick(words[..., 2], self.clouds)
        x = self.centres[cloud]
        # A product and then a sum, each rounded separately: a fused operation rounds differently at
        # the end of a vector.
        x += self._normals(words[..., :2]).mul_(self.noise)
        x += self._normals(own).mul_(self.shift)[:, None]
        return Samples({"x": x.flatten(0, 1)}, classes.flatten())

    @override
    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> None:
        """Return None: samples are not padded."""

    def _normals(self, words: torch.Tensor) -> torch.Tensor:
        """Sum two rows of the pool: words [..., 2] -> [..., features]."""
        rows = pick(words, len(self.pool))
        return self.pool[rows[..., 0]].add_(self.pool[rows[..., 1]])


@NUMERIC
@FROM_CLIENTS
@uneven_sizes("data")
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
    """Create a population of clients whose samples are a function of (seed, client, position).

    Training and test table hold one sample each of further clients, who never train: the test
    table measures the population, and the training table is for steps before the first round
    (pretraining, validation), not for the clients.

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
        alpha: Concentration of the clients' class distributions: small is skewed, large is even;
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
