"""Any number of clients over one table: their rows are drawn with replacement, on demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedraclora.data.dataset import Clients, DataSet
from fedraclora.data.partitioners import class_labels
from fedraclora.data.samples import Samples
from fedraclora.data.virtual_clients import ClientLaw, Sizes, make_law, pick
from fedraclora.limits import Count, NotNegative, Positive, limited
from fedraclora.rng import generator, hash_key


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
        classes, words, _ = self.law.draw(clients, positions)
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


@limited("partition")
def bootstrap(
    data: DataSet,
    *,
    clients: Clients,
    seed: int,
    samples: Count,
    alpha: Positive | None = None,
    sizes: Sizes = "constant",
    spread: NotNegative = 0.0,
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
