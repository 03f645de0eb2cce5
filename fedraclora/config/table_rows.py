"""Rows of the tables of data sets, partitions and models that a config has chosen.

Their arguments are checked when the config is read. They are called later, with what only the data
tell: the shape of a sample, the number of classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar, cast

from fedraclora.binding import Plain, bind, build, row_of, without
from fedraclora.data import DATASETS, PARTITIONS, DataSet, make_partition
from fedraclora.limits import Fraction, Limited, OneOf
from fedraclora.models import MODELS

T = TypeVar("T")


@dataclass(frozen=True)
class Selection(Limited, group="data"):
    """Keys that every data set has: classes, validation split, loss and metrics.

    Attributes:
        labels: Classes to keep, by number, for example [5, 6, 7, 8, 9]; they are numbered anew.
        validation: Fraction of the training samples held out for tuning.
        loss: A loss of your own, ``module:function``; None: that of the data set.
        metrics: Metrics, the most important first: names, and ``module:function`` of your own;
            None: those usual for the data set and its loss.
        duplicates: What happens to samples that are in both training and evaluation data: error
            rejects the data if they are a tenth of the evaluation samples or more, keep only counts
            them.
    """

    labels: list[int] | None = None
    validation: Fraction = 0.0
    loss: str | Mapping[str, object] | None = None
    metrics: list[str | dict[str, object]] | None = None
    duplicates: Annotated[str, OneOf(("error", "keep"))] = "error"


TABLES: dict[str, Mapping[str, Callable[..., object]]] = {
    "data": DATASETS,
    "model": MODELS,
    "partition": PARTITIONS,
}
# Keys of a group beside those of its row, and their readers; arguments that are no keys.
BESIDE: dict[str, tuple[Callable[..., object], tuple[str, ...]]] = {
    "data": (Selection, ("labels", "validation", "loss", "metrics", "duplicates")),
    "partition": (make_partition, ("empty",)),
}
GIVEN = {
    "data": ("clients", "seed"),
    "model": ("shape", "classes", "seed"),
    "partition": ("data", "clients", "seed"),
}


@dataclass(frozen=True)
class TableRow(Generic[T]):
    """A row of a table with the arguments that the config gives it.

    Attributes:
        kind: The group of the config: ``data``, ``partition`` or ``model``.
        group: That group, with the row's name.
    """

    kind: str
    group: Plain

    @classmethod
    def checked(cls, kind: str, group: Plain) -> TableRow[T]:
        """Choose a row, and check its name and its arguments.

        Raises:
            ConfigError: Naming the key, the value and what was expected.
        """
        row = cls(kind, group)
        row._bound(dict.fromkeys(GIVEN[kind]))
        return row

    @property
    def name(self) -> str:
        """The name of the row, as the config gives it."""
        return str(self.group["name"])

    @property
    def function(self) -> Callable[..., object]:
        """The function or class of the row."""
        return row_of(self.kind, TABLES[self.kind], self.name)

    @property
    def defaults(self) -> dict[str, object]:
        """The defaults of the row's arguments, by name."""
        parameters = inspect.signature(self.function).parameters
        return {name: p.default for name, p in parameters.items()}

    def get(self, key: str) -> object:
        """Return the value that the config gives a key; None without one."""
        return self.group.get(key)

    def __call__(self, **given: object) -> T:
        """Call the row with its arguments, and with those that a run finds out (`GIVEN`)."""
        return self._bound(given)()

    def _bound(self, given: Mapping[str, object]) -> Callable[[], T]:
        own, _ = split_group(self.kind, self.group)
        return cast("Callable[[], T]", bind(self.kind, TABLES[self.kind], own, **given))


def selection_of(data: TableRow[DataSet]) -> Selection:
    """Read what is taken of a data set from the keys of its group that the loader leaves."""
    return build("data", Selection, split_group("data", data.group)[1])


def split_group(key: str, group: Plain) -> tuple[dict[str, object], dict[str, object]]:
    """Separate the keys of a table's row from those that are read beside it (`BESIDE`)."""
    row = TABLES[key].get(str(group.get("name"))) if key in TABLES else None
    has = inspect.signature(row).parameters if row else ()  # a key that the row reads itself
    beside = [k for k in BESIDE[key][1] if k not in has] if key in BESIDE else []
    return without(group, *beside), {k: group[k] for k in beside if k in group}
