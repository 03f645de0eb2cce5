"""Define data sets before they are divided among clients, and operations on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.compatibility import Feature
from fedraclora.data.clients import ClientData
from fedraclora.data.entries import Entries
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.limits import ConfigKey, Count, HydraDefault, OneOf

RowNumbers = npt.NDArray[np.int64]
Column = npt.NDArray[Any]
MOST_NAMED = 50  # most columns or clients that the summary names
FLOAT_TYPES = {"float32": torch.float32, "float64": torch.float64}
Dtype = Annotated[str, OneOf(FLOAT_TYPES)]
Clients = Annotated[Count, ConfigKey("clients")]
OF_RUN = HydraDefault("${clients}")  # as many clients as the run has
NUMERIC = Feature("data of numbers", instead="data of texts, such as data=text or instructions")
TEXTS = Feature("data of texts", instead="data of numbers, such as data=table or arrays")
NO_CLASSES = Feature("data without classes", instead="data with classes")
UNDIVIDED = Feature("data without a division", instead="data that bring one")
FROM_CLIENTS = Feature(
    "clients that bring their own samples", instead="a table, which the server divides"
)
BY_COLUMN = Feature(
    "clients that a column of the data names",
    take="partition=natural or auto",
    reads=("data.client",),
)
Division = list[RowNumbers] | ClientData  # rows of each client, or clients created on demand


@dataclass(frozen=True)
class EncodedSamples:
    """Raw samples converted to the form of a data set.

    Attributes:
        samples: In the form that the model needs. The target is meaningless if it was not read.
        rows: Their rows in the source, ascending; other rows were left out, by the rules of the
            data set.
        total: Rows of the source.
    """

    samples: Samples
    rows: RowNumbers
    total: int


class SampleReader(Protocol):
    """Convert raw samples, such as those of a test file, as a data set converts its own."""

    def __call__(
        self, found: Any, reading: Mapping[str, Any], *, target: bool = True
    ) -> EncodedSamples:
        """Read samples.

        Args:
            found: The path of a file, or rows in memory.
            reading: `DataSet.reading`.
            target: Whether to read the target.

        Raises:
            ConfigError: If a column or the kind of file is wrong.
            DataError: If a row cannot be used, naming it.
        """


@dataclass(frozen=True)
class DataSet:
    """Hold training and test samples, with the facts that a model and a partition need.

    Attributes:
        train: Training samples; if ``parts`` are created or read on demand, samples to pretrain on,
            or none.
        test: Held-out samples, possibly none; the object ``train`` itself if the training
            objective is measured (synthetic data).
        classes: Number of outputs: classes, or 1 for a scalar regression or a binary score.
        loss: A key of `fedraclora.data.task.LOSSES`, or the name of one of the user's own.
        metrics: Names of metrics, the primary one first.
        columns: One value per training row, to partition by: ``"label"`` if there are classes (see
            `fedraclora.data.objective.with_labels`), ``"client"`` and its own name for a natural
            client.
        sample_shape: Shape of one input ``"x"``; empty for token ids.
        parts: The clients, if the data set has its own division. Rows of each client are a
            proposal; clients that are created or read on demand are the only possible division.
        optimum: Minimum of the training objective, if known.
        held_out_by: A column whose values are held out as a whole, for test and validation; None if
            rows are.
        aside: Training and test samples that no client has, for pretraining; None if there are
            none.
        tokenizer: A tokenizer of transformers, if samples are texts with answers to generate.
        info: Facts for the summary.
        reading: How raw samples are converted for the model, and its outputs to predictions, in
            plain JSON: ``features`` in order; what to ``subtract`` from inputs and to
                ``divide_by``;
            ``classes`` in order, as numbers if the target has numbers; the scale of a numeric
            ``target``.
        reader: Reads later samples; None: arrays, by `ArrayReader`.
        clients: Every natural client that the source names, also those without rows left; None if
            the source names none.
        entries: The clients' objects, unchanged; None if there are none.
        like: See `fedraclora.data.task.Task`.
        tests: Each client's own test samples, None for a client without; empty if no client has
            any.
        validation: Rows that the source sets apart for validation; None: none.
    """

    train: Samples
    test: Samples
    classes: int
    loss: str
    metrics: tuple[str, ...]
    columns: dict[str, Column]
    sample_shape: tuple[int, ...]
    parts: Division | None = None
    optimum: float | None = None
    held_out_by: str | None = None
    aside: tuple[Samples, Samples] | None = None
    tokenizer: Any = None
    info: dict[str, object] = field(default_factory=dict)
    reading: dict[str, object] = field(default_factory=dict)
    reader: SampleReader | None = None
    clients: Column | None = None
    entries: Entries | None = None
    like: str = ""
    tests: Sequence[Samples | None] = ()
    validation: Samples | None = None

    @property
    def on_demand(self) -> bool:
        """Return whether clients are created on demand, so that there is no table to divide."""
        return not isinstance(self.parts, list | None)


def classification(
    train: Samples,
    test: Samples,
    classes: int,
    info: dict[str, object],
    reading: dict[str, object] | None = None,
) -> DataSet:
    """Build a data set of dense inputs ``"x"`` with classes 0..classes-1 as target."""
    return DataSet(
        train=train,
        test=test,
        classes=classes,
        loss="cross_entropy",
        metrics=("accuracy", "loss"),
        columns={"label": train.target.numpy()},
        sample_shape=tuple(train.inputs["x"].shape[1:]),
        info=info,
        reading=(reading or {}) | {"classes": [*range(classes)]},
    )


def take(samples: Samples, rows: RowNumbers) -> Samples:
    """Select rows by a numpy index."""
    return samples.take(torch.from_numpy(rows))


def select_labels(data: DataSet, labels: Sequence[int]) -> DataSet:
    """Keep the samples of some classes, in train and test, and renumber the classes from 0.

    Args:
        data: A data set with classes.
        labels: Classes to keep; the first becomes class 0 (5..9 become 0..4).

    Returns:
        A data set of ``len(labels)`` classes; columns and parts follow, ``optimum`` is dropped.

    Raises:
        ConfigError: If the data set has no classes, fewer than two are asked for, one is asked
            for twice, or one does not occur, or if the clients are made on demand.
    """
    classes = "label" in data.columns and data.classes > 1
    if (data.like or data.loss) != "cross_entropy" and not classes:
        raise ConfigError("data.labels is for data sets with classes; set data.labels=null")
    if data.on_demand:
        raise ConfigError(
            "data.labels is set, but these clients' samples are made on demand and cannot be "
            "filtered. Set data.labels=null."
        )
    chosen = [int(label) for label in labels]
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ConfigError(f"data.labels={chosen}: give two or more different classes")
    for samples, side in ((data.train, "training"), (data.test, "test")):
        found: list[int] = np.unique(samples.target.numpy()).tolist()
        missing = sorted(set(chosen) - set(found))
        if missing and len(samples):
            raise ConfigError(
                f"data.labels={chosen}: no {side} sample has class {missing}. There are: {found}"
            )
    renumber = np.full(max(chosen) + 1, -1, dtype=np.int64)
    renumber[chosen] = np.arange(len(chosen))

    def rows_of(samples: Samples) -> RowNumbers:
        return np.flatnonzero(np.isin(samples.target.numpy(), chosen))

    def relabel(samples: Samples) -> Samples:
        selected = take(samples, rows_of(samples))
        return replace(selected, target=torch.from_numpy(renumber)[selected.target])

    train, selected = relabel(data.train), keep_rows(data, rows_of(data.train))
    known = data.reading.get("classes")
    names = [known[k] if isinstance(known, list) else k for k in chosen]
    named: dict[str, object] = {"classes": [*map(str, names)]} if "classes" in selected.info else {}
    return replace(
        selected,
        train=train,
        test=train if data.test is data.train else relabel(data.test),
        tests=[own if own is None else relabel(own) for own in data.tests],
        validation=None if data.validation is None else relabel(data.validation),
        classes=len(chosen),
        columns=selected.columns | {"label": train.target.numpy()},
        info=selected.info | {"labels": chosen} | named,
        reading=selected.reading | {"classes": names},
    )


def keep_rows(data: DataSet, rows: RowNumbers) -> DataSet:
    """Keep some training rows (ascending), and the clients' shares of them."""
    place = np.full(len(data.train), -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    parts = data.parts
    if isinstance(parts, list):
        parts = [moved[moved >= 0] for moved in (place[part] for part in parts)]
    train = take(data.train, rows)
    return replace(
        data,
        train=train,
        test=train if data.test is data.train else data.test,
        columns={name: column[rows] for name, column in data.columns.items()},
        parts=parts,
        optimum=None,
        entries=None if data.entries is None else data.entries.keep(rows),
    )
