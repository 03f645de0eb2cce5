"""Any number of clients over one table: their rows are drawn with replacement, on demand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from typing_extensions import override

from fedraclora.data.dataset import Clients, DataSet
from fedraclora.data.partitioners import class_labels
from fedraclora.data.samples import TableRows
from fedraclora.data.virtual_clients import (
    ClientLaw,
    OfLaw,
    Sizes,
    class_mixes,
    pick,
    size_quantiles,
)
from fedraclora.limits import Count, NotNegative, Positive, limited
from fedraclora.rng import generator, hash_key


@dataclass(frozen=True)
class Resampled(OfLaw, TableRows):
    """Clients whose samples are rows of one table, drawn with replacement.

    Attributes:
        samples: The table.
        law: Of sizes and classes.
        rows: Its row numbers, class by class, int64 [N].
        offsets: Where each class starts in ``rows``, int64 [classes + 1].
    """

    law: ClientLaw
    rows: torch.Tensor
    offsets: torch.Tensor

    @override
    def rows_at(self, clients: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        classes, words, _ = self.law.draw(clients, positions.flatten(1))
        first = self.offsets[classes]
        places = first + pick(words[..., 0], self.offsets[classes + 1] - first)
        return self.rows[places].reshape(positions.shape)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Resampled:
        """Move tables to a device; floating samples take ``dtype`` when given."""
        return Resampled(
            self.samples.to(device, dtype),
            self.law.to(device),
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
    spread: NotNegative = 0.5,
) -> Resampled:
    """Draw each client's rows with replacement, so that there can be any number of clients.

    Args:
        data: The data set; its classes, where it has any, are drawn by the client's mix.
        clients: Number of clients.
        seed: The seed of the run.
        samples: Median number of samples of a client.
        alpha: Skew of the clients' mixes of classes (`class_mixes`), or None.
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
    law = ClientLaw(
        hash_key(seed, "partition", "bootstrap"),
        clients,
        size_quantiles(samples, sizes, spread),
        class_mixes(generator(seed, "partition", "mixes"), counts / counts.sum(), alpha),
    )
    rows = torch.from_numpy(np.argsort(labels, kind="stable"))
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    return Resampled(data.train, law, rows, offsets)
