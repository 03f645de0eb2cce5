"""Data sets before they are divided among clients, and operations on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.clients import ClientData
from fedraclora.data.entries import Entries
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.limits import Called, Composed, Count, OneOf

RowNumbers = npt.NDArray[np.int64]
Column = npt.NDArray[Any]
MOST_NAMED = 50  # columns or clients that the summary names
FLOAT_TYPES = {"float32": torch.float32, "float64": torch.float64}
Dtype = Annotated[str, OneOf(FLOAT_TYPES)]
Clients = Annotated[Count, Called("clients")]
OF_RUN = Composed("${clients}")  # as many clients as the run has
Division = list[RowNumbers] | ClientData  # rows of each client, or clients made on demand


@dataclass(frozen=True)
class Read:
    """Raw samples converted to the form of a data set.

    Attributes:
        samples: As the model wants them. Where nothing is to be measured the target is of no use.
        rows: Which of the source they are, ascending; the others were left out, as the data set
            leaves such rows out.
        total: Rows of the source.
    """

    samples: Samples
    rows: RowNumbers
    total: int


class SampleReader(Protocol):
    """Converts raw samples as a data set converts its own, such as those of a test file."""

    def __call__(self, found: Any, reading: Mapping[str, Any], *, target: bool = True) -> Read:
        """Read samples.

        Args:
            found: The path of a file, or rows in memory.
            reading: `DataSet.reading`.
            target: Whether there is something to measure by, expected else it is not looked at.

        Raises:
            ConfigError: If a column or a kind of file is not what.
            DataError: If a row cannot be used, which is named.
        """


@dataclass(frozen=True)
class DataSet:
    """Training and test samples, with what a model and a partition need to know.

    Attributes:
        train: Training samples; beside ``parts`` that are made or found on demand, samples to
            pretrain on, or none.
        test: Held-out samples, which may be none; the object ``train`` itself where the figure of
            merit is the training objective (synthetic data).
        classes: Number of outputs: classes, or 1 for a scalar regression or a binary score.
        loss: A key of `fedraclora.data.task.LOSSES`, or the name of one of the user's own.
        metrics: Names of metrics, the headline first.
        columns: One value per training row, to partition by: ``"label"`` wherever there are
            classes (see `fedraclora.data.objective.with_labels`), ``"client"`` and its own name for
            a natural client.
        sample_shape: Shape of one input ``"x"``; empty for token ids.
        parts: The clients, where the data set brings its own division. Rows of each client are a
            proposal; clients that are made or found on demand are the only division there is.
        optimum: Least value of the training objective, where it is known.
        held_out_by: A column whose values are held out whole, for test and validation alike; None
            where rows are.
        aside: Training and test samples that no client has, for pretraining; None where there
            are none.
        tokenizer: Of transformers, where samples are texts whose answers can be generated.
        info: Facts for the summary.
        reading: How raw samples become those of the model, and its outputs answers, in plain JSON:
            ``features`` in their order; what to ``subtract`` from inputs and to ``divide_by``;
            ``classes`` in their order, numbers where the target has numbers; the scale of a
            ``target`` that is a number.
        reader: Reads samples that come later; None: arrays, as `ArrayReader` reads them.
        clients: Every natural client that the source names, also those of whom no row is left;
            None where none is named.
        entries: What clients brought as objects, as it is; None where nobody has such.
        like: See `fedraclora.data.task.Task`.
        tests: Of each client the samples that it alone measures on, None where it brings none;
            empty where no client does.
        validation: Rows that the source sets apart for it; None: it does not.
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
