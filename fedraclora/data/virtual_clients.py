"""Clients made on demand: what a client holds is a function of its id, and nothing is stored.

How many samples a client has, its mix of classes and its samples are looked up in tables that all
clients share, at places named by random words of (seed, client, position). So a million clients
cost what a thousand cost, a batch is made for all clients of a chunk at once, and a look-up gives
the same bits in any batch: arithmetic that rounds by its place in a vector would not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.checks import check_choice, check_count, check_number
from fedraclora.data.dataset import DataSet
from fedraclora.data.partitioners import class_labels
from fedraclora.rng import generator, hash_key, position_bits
from fedraclora.samples import Samples

SIZES = ("constant", "lognormal", "pareto")
CLIENT, SAMPLE = 0, 1  # streams of random words: of a client, of a sample
QUANTILES = 1024
MIX_NUMBERS = 1 << 20  # in the table of mixes, over all classes


def pick(words: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """Turn words of 32 random bits into numbers from 0 to ``count - 1`` (below 2^31)."""
    return (words * count) >> 32


@dataclass(frozen=True)
class ClientLaw:
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
        return self.quantiles[pick(self.words(clients)[:, 0], len(self.quantiles))]

    def words(self, clients: torch.Tensor) -> torch.Tensor:
        """Four random words of each client [K, 4]: of its size, its mix, and two to spare."""
        return position_bits(self.key, clients, torch.zeros_like(clients)[:, None], CLIENT)[:, 0]

    def draw(
        self, clients: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw the classes of samples.

        Args:
            clients: Ids, int64 [K].
            positions: Of samples in their client, int64 [K, b].

        Returns:
            Classes, int64 [K, b], and three further random words of each sample [K, b, 3].
        """
        mixes = self.mixes[pick(self.words(clients)[:, 1], len(self.mixes))]
        words = position_bits(self.key, clients, positions, SAMPLE)
        classes = torch.searchsorted(mixes, words[..., 0].contiguous(), right=True)
        return classes, words[..., 1:]

    def to(self, device: torch.device | str) -> ClientLaw:
        """Move the tables to a device."""
        return replace(self, quantiles=self.quantiles.to(device), mixes=self.mixes.to(device))


def make_law(
    key: int,
    rng: np.random.Generator,
    *,
    clients: int,
    shares: npt.NDArray[np.float64],
    alpha: float | None,
    samples: int,
    sizes: str,
    spread: float,
) -> ClientLaw:
    """Draw the tables of a law of clients.

    Args:
        key: Of the draws of clients and samples.
        rng: Where the mixes are drawn from.
        clients: Size of the population.
        shares: Mean share of each class over the clients [classes], positive, of sum 1.
        alpha: Concentration of the Dirichlet distribution of the clients' mixes, per class: small
            is skewed, large is even; None gives all clients the mean.
        samples: Median number of samples of a client.
        sizes: ``constant``, ``lognormal`` (``spread``: deviation of the logarithm) or ``pareto``
            (``spread``: inverse of the tail's exponent).
        spread: How unequal clients are; 0 makes all sizes equal.

    Returns:
        The law. A mix is one of up to 2^14 draws, a size one of 2^10 quantiles.

    Raises:
        ConfigError: If a number is out of range.
    """
    mean = np.asarray(shares, dtype=np.float64)[None]
    if alpha is not None:
        count = max(1, min(1 << 14, MIX_NUMBERS // mean.size))
        mean = rng.dirichlet(alpha * mean.size * mean[0], size=count)
    bounds = np.minimum(np.cumsum(mean, axis=1)[:, :-1], 1.0) * 2.0**32
    return ClientLaw(
        key,
        clients,
        torch.from_numpy(_quantiles(samples, sizes, spread)),
        torch.from_numpy(bounds.astype(np.int64)),
    )


def check_law(
    group: str, *, clients: int | None, alpha: float | None, samples: int, sizes: str, spread: float
) -> None:
    """Refuse numbers that no law of clients has.

    Raises:
        ConfigError: Naming the key in its group.
    """
    check_count("clients", clients)
    if alpha is not None:
        check_number(f"{group}.alpha", alpha, 0.0, above=True)
    check_count(f"{group}.samples", samples)
    check_choice(f"{group}.sizes", sizes, SIZES)
    check_number(f"{group}.spread", spread, 0.0)


def _quantiles(samples: int, sizes: str, spread: float) -> npt.NDArray[np.int64]:
    """Numbers of samples at evenly spaced quantiles of a law whose median is ``samples``."""
    levels = (np.arange(QUANTILES) + 0.5) / QUANTILES
    factor = np.ones(QUANTILES)
    if sizes == "lognormal":
        factor = np.exp(spread * np.array([NormalDist().inv_cdf(q) for q in levels]))
    elif sizes == "pareto":
        factor = (2 * (1 - levels)) ** -spread
    return np.maximum(1, np.rint(samples * factor)).astype(np.int64)


@dataclass(frozen=True)
class Resampled:
    """Clients whose samples are rows of one table, drawn with replacement.

    Attributes:
        law: Of sizes and classes.
        samples: The table.
        rows: Its row numbers, class by class, int64 [N].
        offsets: Where each class starts in ``rows``, int64 [classes + 1].
    """

    law: ClientLaw
    samples: Samples
    rows: torch.Tensor
    offsets: torch.Tensor

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.law.clients

    def sizes(self, clients: torch.Tensor) -> torch.Tensor:
        """Number of samples of each client: int64 [K]."""
        return self.law.sizes(clients)

    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Draw samples by position in the client: ids [K], positions [K, b] -> K * b rows."""
        return self.samples.take(self._table_rows(clients, positions).reshape(-1))

    def lengths(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | None:
        """Tokens without padding: ids [K], positions [K, ...] -> int64 like ``positions``."""
        lengths = self.samples.lengths
        if lengths is None:
            return None
        return lengths[self._table_rows(clients, positions.flatten(1))].reshape(positions.shape)

    def _table_rows(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rows of the table, int64 [K, b]."""
        classes, words = self.law.draw(clients, positions)
        first = self.offsets[classes]
        return self.rows[first + pick(words[..., 0], self.offsets[classes + 1] - first)]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Resampled:
        """Move tables to a device; floating samples take ``dtype`` when given."""
        return Resampled(
            self.law.to(device),
            self.samples.to(device, dtype),
            self.rows.to(device),
            self.offsets.to(device),
        )


def bootstrap(
    data: DataSet,
    *,
    clients: int,
    seed: int,
    samples: int,
    alpha: float | None = None,
    sizes: str = "constant",
    spread: float = 0.0,
) -> Resampled:
    """Draw each client's rows with replacement, so that there can be any number of clients.

    Args:
        data: The data set; its classes, where it has any, are drawn by the client's mix.
        clients: Number of clients.
        seed: The seed of the run.
        samples: Median number of samples of a client.
        alpha: Skew of the clients' mixes of classes (`make_law`), or None.
        sizes: ``constant``, ``lognormal`` or ``pareto``.
        spread: How unequal clients are.

    Returns:
        Clients of which nothing is stored.

    Raises:
        ConfigError: If a number is out of range, or ``alpha`` is set and there are no classes.
    """
    check_law(
        "partition", clients=clients, alpha=alpha, samples=samples, sizes=sizes, spread=spread
    )
    labels = np.zeros(len(data.train), dtype=np.int64)
    if alpha is not None:
        labels = np.asarray(class_labels(data))
    counts = np.unique(labels, return_counts=True)[1]
    law = make_law(
        hash_key(seed, "partition", "bootstrap"),
        generator(seed, "partition", "mixes"),
        clients=clients,
        shares=counts / counts.sum(),
        alpha=alpha,
        samples=samples,
        sizes=sizes,
        spread=spread,
    )
    rows = torch.from_numpy(np.argsort(labels, kind="stable"))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    return Resampled(law, data.train, rows, offsets)
