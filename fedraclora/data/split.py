"""Choose training and test samples: all splits of rows are here.

A source either names its test samples (``data.test_file``, ``data.test_function``, a column
``data.split``), or a `Holdout` draws them from its rows (``data.test_fraction``). Validation
samples are drawn from the remaining rows (``data.validation``). Samples that clients hold out are
in `fedraclora.data.client_split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedraclora.data.dataset import Column, DataSet, RowNumbers, keep_rows, take
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import Fraction, limited
from fedraclora.rng import generator

Split = tuple[RowNumbers, RowNumbers]  # kept rows and held-out rows, both ascending
TEST_FRACTION = 0.2  # default fraction to hold out if there are no test samples
USES = ("train", "test", "validation")  # values of the column of `data.split`


@dataclass(frozen=True)
class Holdout:
    """Define a fraction of rows to hold out, and the seed of the draw.

    Attributes:
        fraction: Fraction of the rows, in [0, 1), rounded to the nearest count; 0: none.
        seed: Seed of the draw.
        use: ``test`` or ``validation``.
    """

    fraction: float
    seed: int = 0
    use: str = "test"

    def split(
        self, rows: int, *, labels: Column | None = None, owners: Column | None = None
    ) -> Split:
        """Split the rows of a table.

        Args:
            rows: Number of rows.
            labels: One for each row, or None: the same fraction of every label is held out.
            owners: One for each row, or None: whole owners are held out, in random order, until
                they fill the fraction; labels are then ignored.

        Returns:
            Kept rows and held-out rows, both ascending; together 0..rows-1.

        Raises:
            ConfigError: If the fraction leaves one side empty, naming its key.

        Example:
            >>> kept, held = Holdout(0.25).split(8, labels=np.array([0, 1] * 4))
            >>> len(kept), sorted(held % 2)
            (6, [np.int64(0), np.int64(1)])
            >>> kept, held = Holdout(0.3).split(6, owners=np.array(list("aabbcc")))
            >>> len(kept), len(held)
            (4, 2)
        """
        if self.fraction == 0:
            return np.arange(rows), np.arange(0)
        rng = generator(self.seed, "split", self.use)
        if owners is None:
            kept, held = _drawn(rows, self.fraction, rng, labels)
        else:
            kept, held = _drawn_owners(owners, self.fraction, rng)
        if not len(held) or not len(kept):
            key = "data.validation" if self.use == "validation" else "data.test_fraction"
            raise ConfigError(
                f"{key}={self.fraction} of {rows} rows leaves {len(kept)} to train on and "
                f"{len(held)} to {'validate' if self.use == 'validation' else 'test'} on: choose "
                "another fraction"
            )
        return kept, held

    def split_each(self, parts: Sequence[RowNumbers]) -> Split:
        """Split the rows of each client; a client that would keep no row holds none out.

        Args:
            parts: The rows of each client.
        """
        rng, held = generator(self.seed, "split", self.use), []
        for part in parts:
            stay, out = _drawn(len(part), self.fraction, rng)
            held.append(part[out] if len(stay) else part[:0])
        out = np.sort(np.concatenate(held))
        return np.setdiff1d(np.concatenate(parts), out), out

    def split_client(self, rows: int, client: int) -> Split:
        """Split the rows of one client with a draw of its own; it keeps some if it has any."""
        rng = generator(self.seed, "split", self.use, client)
        kept, held = _drawn(rows, self.fraction, rng)
        return (kept, held) if len(kept) else (held, kept)


NO_HOLDOUT = Holdout(0.0)


def _drawn(
    rows: int, fraction: float, rng: np.random.Generator, labels: Column | None = None
) -> Split:
    """Draw rows to hold out, the same fraction of every label if there are labels."""
    groups = [np.arange(rows)]
    if labels is not None:
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    held_out = np.zeros(rows, dtype=bool)
    for group in groups:
        held_out[rng.permutation(group)[: int(fraction * len(group) + 0.5)]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _drawn_owners(owners: Column, fraction: float, rng: np.random.Generator) -> Split:
    """Draw at least one owner, until the owners' rows fill the fraction."""
    names, sizes = np.unique(owners, return_counts=True)
    order = rng.permutation(len(names))
    filled = int(np.searchsorted(np.cumsum(sizes[order]), fraction * len(owners)))
    held_out = np.isin(owners, names[order[: filled + 1]])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def holdout_of(fraction: float | None, seed: int, **named: object) -> Holdout | None:
    """Decide whether test samples are held out; None if a key names test samples.

    Args:
        fraction: ``data.test_fraction``; None: `TEST_FRACTION` if no key names test samples.
        seed: ``data.split_seed``.
        **named: The keys that may name test samples (``test_file``, ``test_function``, ``split``),
            and their values.

    Raises:
        ConfigError: If two keys define the test samples.
    """
    given = [f"data.{key}={value}" for key, value in named.items() if value is not None]
    if fraction is not None:
        given.append(f"data.test_fraction={fraction}")
    if len(given) > 1:
        raise ConfigError(
            f"{' and '.join(given)} each choose the test samples: leave out all but one"
        )
    if given and fraction is None:
        return None
    return Holdout(TEST_FRACTION if fraction is None else fraction, seed)


def rows_by_use(values: Column, where: str) -> dict[str, RowNumbers]:
    """Find the rows that a column marks as train, test and validation.

    Args:
        values: The use of each row, one of `USES`.
        where: File and column, for messages.

    Raises:
        DataError: If a value is none of these, or no row is for train or for test.
    """
    found = {use: np.flatnonzero(values == use) for use in USES}
    if odd := sorted({*values} - {*USES}) or [use for use in USES[:2] if not len(found[use])]:
        raise DataError(
            f"{where} has the value {odd[0]!r}, but must have train, test or validation only (it "
            f"has {sorted({*values})})"
        )
    return found


@limited("data")
def hold_out(data: DataSet, validation: Fraction, seed: int) -> tuple[DataSet, Samples | None]:
    """Split off validation samples: by class, or by `DataSet.held_out_by`.

    Args:
        data: The data set.
        validation: Fraction of the training samples, in [0, 1); 0 leaves the data set as it is.
        seed: The seed of the run.

    Returns:
        The data set without the held-out rows (columns and parts follow; ``optimum`` is dropped,
        since the objective changes), and the held-out samples or None.

    Raises:
        ConfigError: If the fraction (key ``data.validation``) leaves one side empty.
    """
    if validation == 0:
        return data, data.validation
    if data.validation is not None:
        raise ConfigError(
            f"data.validation={validation}, but data.split already marks the validation rows: "
            "leave it at 0"
        )
    if not len(data.train):
        raise ConfigError(
            f"data.validation={validation}, but the server has no training samples: these "
            "clients bring them. Leave data.validation at 0."
        )
    owners = None if data.held_out_by is None else data.columns[data.held_out_by]
    how, labels = Holdout(validation, seed, "validation"), data.columns.get("label")
    kept, held = how.split(len(data.train), labels=labels, owners=owners)
    return keep_rows(data, kept), take(data.train, held)


def hold_out_test(data: DataSet, fraction: float) -> DataSet:
    """Hold out test samples from each client; from all rows if rows have no clients yet.

    Raises:
        DataError: If the clients have too few.
    """
    whole = [np.arange(len(data.train))]
    kept, held = Holdout(fraction).split_each(data.parts if isinstance(data.parts, list) else whole)
    if not len(held):
        raise DataError(
            f"the clients have {len(data.train)} samples in all, too few to hold out test "
            "samples. Give test=... (with test=0 the server evaluates nothing)."
        )
    info = data.info | {"held_out": fraction}
    return replace(keep_rows(data, kept), test=take(data.train, held), info=info)
