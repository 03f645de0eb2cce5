"""Divide training rows among clients.

Most are those of flwr-datasets. Rows are shuffled first, from the seed tree: its partitioners
cut blocks of neighbouring rows, and neighbours may be alike (one writer, one film).
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.data.client_law import (
    ClientLaw,
    LawClientData,
    SizeLaw,
    class_mixes,
    pick,
    size_quantiles,
    uneven_sizes,
)
from fedraclora.data.clients import TableRows
from fedraclora.data.dataset import Clients, Column, DataSet, RowNumbers
from fedraclora.errors import ConfigError
from fedraclora.imports import as_user_error
from fedraclora.limits import Count, NotNegative, Positive, Whole, limited
from fedraclora.rng import generator, hash_key

DIVIDES = Feature(
    "a partition that divides the rows of a table",
    instead="partition=given",
    avoids={
        "clients that bring their own samples": "the samples are divided already",
    },
)
BY_CLASS = Feature(
    "a partition by class",
    instead="partition=iid, or natural where a column names the client",
    avoids={"data without classes": "it divides the samples of each class"},
)


@DIVIDES
def iid(data: DataSet, *, clients: int, seed: int) -> list[RowNumbers]:
    """Divide rows evenly at random; sizes differ by one at most."""
    return _divide(data, _library().IidPartitioner(clients), {}, seed)


@DIVIDES
@BY_CLASS
@limited("partition")
def dirichlet(
    data: DataSet, *, clients: int, seed: int, alpha: Positive = 0.5, min_size: Whole = 1
) -> list[RowNumbers]:
    """Divide each class by proportions drawn from a Dirichlet distribution.

    Args:
        data: The data set.
        clients: Number of clients.
        seed: The seed of the run.
        alpha: Concentration: small is skewed, large is even.
        min_size: Fewest samples of a client; the draw is repeated up to ten times to reach it.

    Returns:
        Rows of each client.

    References:
        Yurochkin et al., *Bayesian nonparametric federated learning of neural networks*,
        ICML 2019, arXiv:1905.12022.
    """
    return _by_label(data, clients, seed, "Dirichlet", float(alpha), min_size)


@DIVIDES
@BY_CLASS
@limited("partition")
def pathological(
    data: DataSet, *, clients: int, seed: int, classes_per_client: Count = 2
) -> list[RowNumbers]:
    """Give each client samples of a few classes only.

    Client k has class k (modulo the number of classes) and others drawn at random, so that no
    class is lost if there are as many clients as classes.

    Args:
        data: The data set.
        clients: Number of clients.
        seed: The seed of the run.
        classes_per_client: Classes of each client.

    Returns:
        Rows of each client.

    References:
        McMahan et al., *Communication-efficient learning of deep networks from decentralized
        data*, AISTATS 2017, arXiv:1602.05629 (the pathological non-IID partition).
    """
    return _by_label(data, clients, seed, "Pathological", classes_per_client, "first-deterministic")


@DIVIDES
@BY_CLASS
@limited("partition")
def shards(
    data: DataSet,
    *,
    clients: int,
    seed: int,
    shards_per_client: Count | None = 2,
    shard_size: Count | None = None,
) -> list[RowNumbers]:
    """Sort rows by class, cut them into shards and deal the shards out.

    Args:
        data: The data set.
        clients: Number of clients.
        seed: The seed of the run.
        shards_per_client: Shards of each client; None deals out all shards of ``shard_size``.
        shard_size: Samples of a shard; None: the largest with enough shards for all clients.

    Returns:
        Rows of each client. Rows that fill no shard are left out.

    References:
        McMahan et al., AISTATS 2017, arXiv:1602.05629 (two shards per client).
    """
    if shards_per_client is None and shard_size is None:
        raise ConfigError("set partition.shards_per_client or partition.shard_size, or both")
    keep = shards_per_client is None
    return _by_label(
        data, clients, seed, "Shard", shards_per_client, shard_size, keep_incomplete_shard=keep
    )


@DIVIDES
@BY_CLASS
@limited("partition")
def fedslop(data: DataSet, *, clients: int, seed: int, alpha: Positive = 0.1) -> list[RowNumbers]:
    """Cut each class at ``int(cumsum(p) * count)`` with p from a Dirichlet distribution.

    There is no least size, so clients may be empty: use it with ``partition.empty=drop``.

    Args:
        data: The data set.
        clients: Number of clients.
        seed: The seed of the run.
        alpha: Concentration: small is skewed, large is even.

    Returns:
        Rows of each client.

    References:
        FedSLoP, arXiv:2604.24012 (the partition of its MNIST experiment).
    """
    labels = class_labels(data)
    rng = generator(seed, "partition")
    owner = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, float(alpha)))
        cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        sizes = np.diff(cuts, prepend=0, append=len(rows))
        owner[rows] = np.repeat(np.arange(clients), sizes)
    return [np.flatnonzero(owner == client) for client in range(clients)]


def class_labels(data: DataSet) -> Column:
    """Read the class of each training row.

    Raises:
        ConfigError: If the data set has no classes.
    """
    if "label" not in data.columns:
        raise ConfigError(
            "this partition divides by class, but the data set has no classes. Use "
            "partition=iid, or partition=natural with a client column."
        )
    return data.columns["label"]


class _Plots(PathFinder):
    """Load the plotting libraries of flwr-datasets only when they are used.

    flwr-datasets imports them at once (seaborn, matplotlib and scipy.stats), which costs a second
    of every start.
    """

    @classmethod
    @override
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "flwr_datasets.visualization":
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def _library() -> Any:
    """Import the partitioners of flwr-datasets."""
    sys.meta_path.insert(0, _Plots)
    try:
        from flwr_datasets import partitioner
    finally:
        sys.meta_path.remove(_Plots)
    return partitioner


def _by_label(
    data: DataSet, clients: int, seed: int, kind: str, *given: object, **named: object
) -> list[RowNumbers]:
    """Divide by the classes, with a seeded partitioner of flwr-datasets."""
    make, drawn = vars(_library())[f"{kind}Partitioner"], hash_key(seed, "partition")
    partitioner = make(clients, "label", *given, seed=drawn, **named)
    return _divide(data, partitioner, {"label": class_labels(data)}, seed)


def by_partitioner(
    partitioner: Any, data: DataSet, *, clients: int | None, seed: int
) -> list[RowNumbers]:
    """Divide with a partitioner of flwr-datasets, or a similar one, that sees all columns.

    Raises:
        ConfigError: If it cannot divide these data.
    """
    del clients  # the partitioner knows the number
    divider = copy.deepcopy(partitioner)  # a partitioner accepts data only once
    what, name = f"dividing {len(data.train)} samples by it", type(partitioner).__name__
    after = f"; the columns of these data are: {', '.join(data.columns) or 'none'}"
    with as_user_error(ConfigError, f"partition is a {name}, and ", what, after, passing=()):
        return _divide(data, divider, data.columns, seed)


def _divide(
    data: DataSet, partitioner: Any, known: Mapping[str, Column], seed: int
) -> list[RowNumbers]:
    """Run a partitioner of flwr-datasets over shuffled rows; return the rows of each client."""
    from datasets import Dataset

    class Whole(Dataset):  # type: ignore[misc]
        """Returns a column at once instead of row by row."""

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            return found[:] if isinstance(key, str) else found

    order = generator(seed, "partition", "order").permutation(len(data.train))
    columns = {"row": order} | {name: np.asarray(values)[order] for name, values in known.items()}
    # Progress bars and warnings repeat our own checks and reports.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        partitioner.dataset = Whole.from_dict(columns)
        partitioner.load_partition(0)
        # Most partitioners hold a table of the rows of each client; reading it is much faster than
        # the public way of a Dataset per client.
        table = getattr(partitioner, "_partition_id_to_indices", None)
        clients = range(partitioner.num_partitions)
        if isinstance(table, dict) and set(table) == set(clients):
            rows = np.asarray(partitioner.dataset.with_format("numpy")["row"][:])
            return [np.sort(rows[np.asarray(table[k], dtype=np.int64)]) for k in clients]
        return [np.sort(np.asarray(partitioner.load_partition(k)["row"][:])) for k in clients]


@dataclass(frozen=True)
class Resampled(LawClientData, TableRows):
    """Clients whose samples are rows of one table, sampled with replacement.

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


@DIVIDES
@uneven_sizes("partition")
@limited("partition")
def bootstrap(
    data: DataSet,
    *,
    clients: Clients,
    seed: int,
    samples: Count = 50,
    alpha: Positive | None = 0.5,
    sizes: SizeLaw = "constant",
    spread: NotNegative = 0.5,
) -> Resampled:
    """Sample each client's rows with replacement, for any number of clients.

    Args:
        data: The data set; its classes, if it has any, are drawn by the client's distribution.
        clients: Number of clients.
        seed: The seed of the run.
        samples: Median number of samples of a client.
        alpha: Skew of the clients' class distributions (`class_mixes`), or None.
        sizes: ``constant``, ``lognormal`` or ``pareto``.
        spread: How unequal clients are.

    Returns:
        Clients without stored samples.

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
