"""Whether what is measured on was trained on.

Rows that occur twice by chance, as short sentences do, are in order: data have them. Refused is a
test table that shares its memory with the training samples, that holds the same rows, or all of
whose rows are training samples although training samples are seldom alike: that is no chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.samples import Samples
from fedraclora.errors import DataError
from fedraclora.rng import generator

Keys = npt.NDArray[np.int64]

GLANCE = 16  # numbers of a row that are compared first
FEW = 8  # so few test rows may all be twins by chance
ROWS_AT_ONCE = 4096  # rows

REMEDY = (
    "a model that is measured on what it was trained on looks better than it is. Name test samples "
    "that no client has (data.test), or leave data.test out, so that some are held out"
)


def refuse_shared(train: Sequence[Samples], test: Samples) -> None:
    """Reject test samples that are training samples.

    Args:
        train: The tables that clients train on.
        test: What the server measures on.

    Raises:
        DataError: If they are the same, as this module's docstring says.
    """
    tables = [table for table in train if len(table)]
    if not tables or not len(test):
        return
    pairs = [(t.inputs[n], x) for t in tables for n, x in test.inputs.items() if n in t.inputs]
    if any(_overlap(one, two) for one, two in pairs):
        raise DataError(f"the test samples are the training samples themselves: {REMEDY}")
    if any(_form(table) != _form(test) for table in tables):
        return
    # Most tables differ at a glance; then nothing is read whole.
    glances = np.concatenate([row_keys(table, GLANCE) for table in tables])
    if not np.isin(row_keys(test, GLANCE), glances).all():
        return
    trained, tested = np.concatenate([row_keys(table) for table in tables]), row_keys(test)
    if not np.isin(tested, trained).all():
        return
    same = np.array_equal(np.sort(trained), np.sort(tested))
    _, counts = np.unique(trained, return_counts=True)
    twins = int(counts[counts > 1].sum())
    if same or (len(tested) >= FEW and 2 * twins < len(trained)):
        relation = "the same rows as" if same else "all of them among"
        raise DataError(
            f"the {len(tested)} test samples are {relation} the {len(trained)} training samples: "
            f"{REMEDY}"
        )


def row_keys(samples: Samples, numbers: int | None = None) -> Keys:
    """Hash every row, inputs and target: int64 [N]; equal rows have equal keys.

    Args:
        samples: The table.
        numbers: How many numbers of each tensor to look at, evenly spread; None for all.
    """
    keys = torch.zeros(len(samples), dtype=torch.int64)
    for name, tensor in samples.tensors.items():
        flat = tensor.reshape(len(tensor), -1)
        if numbers is not None:
            flat = flat[:, :: max(1, flat.shape[1] // numbers)]
        draw = generator(0, "row keys", name).integers(1 << 62, size=flat.shape[1]) * 2 + 1
        weights = torch.from_numpy(draw)
        for start in range(0, len(flat), ROWS_AT_ONCE):
            part = flat[start : start + ROWS_AT_ONCE].cpu().contiguous()
            if part.is_floating_point():
                part = part.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[part.itemsize])
            # A sum that wraps around: linear in the row, by random odd weights.
            keys[start : start + ROWS_AT_ONCE] += (part.to(torch.int64) * weights).sum(dim=1)
    found: Keys = keys.numpy()
    return found


def _form(samples: Samples) -> dict[str, tuple[object, ...]]:
    return {name: (tensor.shape[1:], tensor.dtype) for name, tensor in samples.tensors.items()}


def _overlap(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Check whether two tensors look at the same memory; of views with gaps, only equal ones."""
    if one.device != two.device or not one.numel() or not two.numel():
        return False
    if not (one.is_contiguous() and two.is_contiguous()):
        return one.data_ptr() == two.data_ptr()
    ends = [tensor.data_ptr() + tensor.numel() * tensor.itemsize for tensor in (one, two)]
    return one.data_ptr() < ends[1] and two.data_ptr() < ends[0]
