"""Detect samples that are in both training and evaluation data; a tenth or more is an error.

Two samples are duplicates if all inputs and the target are equal. Rows are compared by hashes:
first by hashes of a few numbers, so that most tables are not read completely. Padding does not
count, and each conversation of a packed sample is compared by itself.

Rows with few possible values, such as yes-or-no answers, repeat by chance, and no cleaning would
help: then we expect as many duplicates as among the training samples themselves. This applies to
rows that independent columns with the same values would also repeat, and to rows that occur three
times or more on average; it does not apply to a file that holds each row twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.clients import ClientData
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.errors import DataError
from fedraclora.rng import generator

Keys = npt.NDArray[np.int64]

GLANCE, GLANCED = 16, 4  # numbers of a row that are compared first; of tokens, every fourth
ROWS_AT_ONCE = 4096  # rows
MOST, LEAST = 0.1, 2  # share of the measured samples that is refused; fewest of them
DEVIATIONS = 3  # factor between duplicates and the number expected by chance
BY_CHANCE = 0.1  # expected equal rows of a row from which rows repeat by chance
REPEATED = 3  # mean occurrences of a training sample from which rows repeat by chance

REMEDY = "remove these rows from the training or from the test samples, or set data.duplicates=keep"


@dataclass(frozen=True)
class RowSubset:
    """Some rows of a table.

    Attributes:
        samples: The table.
        rows: Which rows, int64; None: all.
    """

    samples: Samples
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.samples) if self.rows is None else len(self.rows)

    @classmethod
    def of(cls, data: ClientData | None) -> list[RowSubset]:
        """List the rows of clients, if they are rows of a table in memory."""
        found = None if data is None else data.table
        return [] if found is None else [cls(*found)]

    def take(self, kept: npt.NDArray[np.bool_]) -> Samples:
        """Take some of the rows."""
        places = torch.from_numpy(np.flatnonzero(kept))
        return self.samples.take(places if self.rows is None else self.rows[places])

    def keys(self, numbers: int | None = None) -> Keys:
        """Hash every row; see `row_keys`."""
        if numbers is None and self.rows is not None:
            return row_keys(self.samples.take(self.rows))
        keys = row_keys(self.samples, numbers)
        return keys if self.rows is None else keys[self.rows.numpy()]


def check_duplicates(
    train: Sequence[RowSubset], tests: Mapping[str, Sequence[RowSubset]], source: str, *, keep: bool
) -> dict[str, str]:
    """Count the samples that are in both training and evaluation data.

    Args:
        train: The clients' training samples.
        tests: Evaluation samples, by their use.
        source: The source of both, for messages.
        keep: Whether any number of duplicates is allowed.

    Returns:
        The number of duplicates by use; empty if there are none.

    Raises:
        DataError: If an evaluation table is the training table, or if a tenth or more of its
            samples are training samples, and not by chance.
    """
    train, found = [table for table in train if len(table)], dict[str, str]()
    for what, measured in tests.items():
        tables = [table for table in measured if len(table)]
        if not train or not tables or _forms(train) != _forms(tables) or len(_forms(train)) > 1:
            continue
        if any(_overlap(one, two) for one in train for two in tables) and not keep:
            raise DataError(
                f"the {what} ({source}) are the training samples themselves, so the model would "
                f"look better than it is: {REMEDY}"
            )
        shared = shared_rows(train, tables)
        count, total = int(shared.sum()), len(shared)
        if not count:
            continue
        trained = sum(map(len, train))
        message = f"{count} of the {total} {what} are among the {trained} training samples, too"
        chance = _by_chance(train) if count >= MOST * total and not keep else 0.0
        margin = DEVIATIONS * math.sqrt(chance * (1 - chance) / total)
        many = count >= max(LEAST, (chance + MOST + margin) * total)
        if not keep and (many or _same(train, tables, shared)):
            raise DataError(
                f"{message} (inputs and target are equal; {source}), so the model would look "
                f"better than it is: {REMEDY}"
            )
        found[what] = f"{message} (inputs and target are equal)"
    return found


def shared_rows(train: Sequence[RowSubset], test: Sequence[RowSubset]) -> npt.NDArray[np.bool_]:
    """Mark the samples of some tables that are in others; for packed samples, the conversations."""
    if any(_is_tokens(table.samples) for table in train):
        return np.isin(_all_keys(test), _all_keys(train))
    glances = [[table.keys(GLANCE) for table in tables] for tables in (train, test)]
    found = np.isin(np.concatenate(glances[1]), np.concatenate(glances[0]))
    if not found.any():
        return found
    # Only rows with equal first hashes are read completely.
    alike = np.unique(np.concatenate(glances[1])[found])
    trained, tested = (
        np.concatenate(
            [
                row_keys(table.take(np.isin(keys, alike)))
                for table, keys in zip(tables, of, strict=True)
            ]
        )
        for tables, of in zip((train, test), glances, strict=True)
    )
    found[found] = np.isin(tested, trained)
    return found


def row_keys(samples: Samples, numbers: int | None = None) -> Keys:
    """Hash every row, inputs and target: int64 [N]; equal rows have equal keys.

    Args:
        samples: The table.
        numbers: How many numbers of each tensor to look at, evenly spread; None for all.
    """
    starts = range(0, len(samples), ROWS_AT_ONCE)
    parts = (samples.mapped(itemgetter(slice(s, s + ROWS_AT_ONCE))) for s in starts)
    keys = _conversation_keys if _is_tokens(samples) else _keys
    found: Keys = np.concatenate([keys(part, numbers) for part in parts] or [np.zeros(0, np.int64)])
    return found


def _all_keys(tables: Sequence[RowSubset]) -> Keys:
    return np.concatenate([table.keys() for table in tables])


def _weights(name: str, count: int) -> torch.Tensor:
    """Draw odd weights for the numbers of a row; fewer numbers have the first weights."""
    return torch.from_numpy(generator(0, "row keys", name).integers(1 << 62, size=count) * 2 + 1)


def _columns(
    samples: Samples, numbers: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return integers [N, q] for every tensor that are equal if its values are, and weights."""
    mask = samples.inputs.get("attention_mask")
    for name, tensor in samples.tensors.items():
        flat = tensor.reshape(len(tensor), -1)
        # Tokens have as many columns as the longest row of their table.
        is_tokens = mask is not None and mask.shape == tensor.shape
        step = GLANCED if is_tokens else max(1, flat.shape[1] // (numbers or flat.shape[1]))
        kept = slice(None, None, 1 if numbers is None else step)
        weights, flat = _weights(name, flat.shape[1])[kept], flat[:, kept].cpu().contiguous()
        if flat.is_floating_point():
            whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize]
            flat = (flat + 0.0).view(whole)  # turns negative zero into zero
        flat = flat.to(torch.int64)
        if mask is not None and is_tokens:
            flat = flat * (mask[:, kept].cpu() != 0)
        yield flat, weights


def _keys(samples: Samples, numbers: int | None) -> Keys:
    keys = torch.zeros(len(samples), dtype=torch.int64)
    for flat, weights in _columns(samples, numbers):
        # A sum that wraps around: linear in the row, by random odd weights.
        keys += (flat * weights).sum(dim=1)
    found: Keys = keys.numpy()
    return found


def _is_tokens(samples: Samples) -> bool:
    """Check whether each token has a target."""
    ids, target = samples.inputs.get("input_ids"), samples.target
    return ids is not None and target.shape == ids.shape and not target.is_floating_point()


def _conversation_keys(samples: Samples, _: int | None = None) -> Keys:
    """Hash each conversation up to its last token with a target: the rest may be padding."""
    ids, target = samples.inputs["input_ids"].cpu(), samples.target.cpu()
    usual = torch.arange(ids.shape[1]).expand_as(ids)
    places = samples.inputs.get("position_ids", usual).cpu()
    first = places == 0
    number = first.flatten().cumsum(0).reshape(ids.shape) - 1
    wanted = (target != IGNORED_TOKEN) & ~first
    count = int(number.max()) + 1 if number.numel() else 0
    last = torch.zeros(count, dtype=torch.int64)
    last.scatter_reduce_(0, number.flatten(), (places * wanted).flatten(), "amax")
    of_ids, of_targets = (_weights(name, ids.shape[1])[places] for name in ("ids", "target"))
    each = ids * of_ids + target.where(wanted, 0) * of_targets
    keys = torch.zeros(count, dtype=torch.int64)
    keys.index_add_(0, number.flatten(), each.where(places <= last[number], 0).flatten())
    found: Keys = keys.numpy()
    return found


def _by_chance(train: Sequence[RowSubset]) -> float:
    """Estimate the share of samples with a duplicate by chance; 0 if rows do not repeat so."""
    _, counts = np.unique(_all_keys(train), return_counts=True)
    alike = float(counts[counts > 1].sum() / counts.sum())
    if counts.mean() >= REPEATED:
        return alike
    expected, first = float(counts.sum()), train[0]
    step = max(1, len(first) // ROWS_AT_ONCE)
    some = first.take(np.arange(len(first)) % step == 0)
    for flat, _ in _columns(some):
        for column in flat.T.numpy():
            _, times = np.unique(column, return_counts=True)
            pairs = len(column) * (len(column) - 1)
            expected *= float((times * (times - 1)).sum()) / pairs if pairs else 0.0
            if expected < BY_CHANCE:
                return 0.0
    return alike


def _same(
    train: Sequence[RowSubset], test: Sequence[RowSubset], shared: npt.NDArray[np.bool_]
) -> bool:
    """Check whether both have the same rows, equally often."""
    if not shared.all() or len(shared) != sum(map(len, train)):
        return False
    return np.array_equal(np.sort(_all_keys(train)), np.sort(_all_keys(test)))


def _forms(tables: Sequence[RowSubset]) -> set[tuple[object, ...]]:
    """Describe the form of samples; tokens may be padded to other lengths, or packed."""
    found = set[tuple[object, ...]]()
    for samples in (table.samples for table in tables):
        if _is_tokens(samples):
            found.add(("tokens",))
            continue
        mask = samples.inputs.get("attention_mask")
        shapes = {
            name: ("tokens",) if mask is not None and mask.shape == t.shape else (*t.shape[1:],)
            for name, t in samples.tensors.items()
        }
        found.add(tuple((n, shape, samples.tensors[n].dtype) for n, shape in shapes.items()))
    return found


def _overlap(one: RowSubset, two: RowSubset) -> bool:
    """Check whether a whole table shares memory with another."""
    if two.rows is not None:
        return False
    named = one.samples.inputs, two.samples.inputs
    return any(_overlaps(named[0][n], named[1][n]) for n in named[0].keys() & named[1].keys())


def _overlaps(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Check whether two tensors share memory; for views with gaps, only if they are equal."""
    if one.device != two.device or not one.numel() or not two.numel():
        return False
    if not (one.is_contiguous() and two.is_contiguous()):
        return one.data_ptr() == two.data_ptr()
    ends = [tensor.data_ptr() + tensor.numel() * tensor.itemsize for tensor in (one, two)]
    return one.data_ptr() < ends[1] and two.data_ptr() < ends[0]
