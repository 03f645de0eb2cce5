"""Convert a user's arrays to samples if their meaning is clear, else reject them.

Images of bytes become numbers from 0 to 1, integer labels of any type become int64, and a column of
labels [N, 1] becomes [N]. Ambiguous arrays (fractions as labels, one-hot rows) are refused, with a
proposal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedraclora.data.npz import read_arrays
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES, is_binary, read_as
from fedraclora.errors import DataError

# Types that torch supports only partly.
WIDER = {"uint16": "int32", "uint32": "int64", "uint64": "int64", "float16": "float32"}
LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class SampleSpec:
    """The required shape and type of samples.

    Attributes:
        shape: Shape of one input ``"x"``; empty for token ids; None for numbers of any shape.
        loss: The loss that defines how they are read (`fedraclora.data.task.Task.reads`).
        classes: Number of outputs; None if it is derived from the targets.
    """

    shape: tuple[int, ...] | None
    loss: str
    classes: int | None = None

    def validate(self, samples: Samples, where: str) -> Samples:
        """Convert samples and check them.

        Args:
            samples: The raw samples.
            where: A file or function and a client, for messages.

        Returns:
            Floating numbers in float32, in memory allocated by torch: products round by alignment.

        Raises:
            DataError: Naming the place, the found and the expected form, and what to do.
        """
        inputs = {n: self._input(n, t, samples, where) for n, t in samples.inputs.items()}
        fitted = Samples(inputs, self._target(samples, where)).clone()
        x = inputs.get("x")
        if self.shape and (x is None or tuple(x.shape[1:]) != self.shape):
            found = [*inputs] if x is None else tuple(x.shape[1:])
            raise DataError(f"{where}: one input has {found}, but data.shape={self.shape}")
        return fitted

    def nothing(self) -> Samples:
        """Return an empty table of this form, without token ids."""
        inputs = {"x": torch.zeros(0, *self.shape)} if self.shape else {}
        wide = self.loss in {"squared_error", "multi_label"}
        target = torch.zeros(0, self.classes or 1) if wide else torch.zeros(0).long()
        return Samples(inputs, target)

    def _input(self, name: str, value: torch.Tensor, samples: Samples, where: str) -> torch.Tensor:
        if self.shape == () or set(samples.inputs) != {"x"}:
            value = value.float() if value.is_floating_point() else value.long()
        else:
            value = value / 255.0 if value.dtype == torch.uint8 else value.float()
            value = value[:, None] if value.dim() == 1 else value
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            row = int((~torch.isfinite(value.reshape(len(value), -1))).any(dim=1).nonzero()[0])
            raise DataError(
                f"{where}: {name} holds NaN, an infinity or a number that float32 cannot hold, "
                f"first in row {row}: fill such values, or leave the rows out"
            )
        return value

    def _target(self, samples: Samples, where: str) -> torch.Tensor:
        target = samples.target
        if self.loss in {"cross_entropy", "logistic"}:
            return self._labels(target, where)
        if read_as(self.loss).each:
            return self._labelled(samples, where)
        if self.loss not in LOSSES:  # a user's loss may read any target
            return target.float() if target.is_floating_point() else target.long()
        numbers = target.float()
        if not bool(torch.isfinite(numbers).all()):
            raise DataError(f"{where}: the target holds NaN or an infinity")
        if self.loss == "multi_label":
            numbers = numbers.flatten(1) if numbers.dim() > 1 else numbers[:, None]
            if not is_binary(numbers):
                other = float(numbers[(numbers != 0) & (numbers != 1)][0])
                raise DataError(
                    f"{where}: the target holds {other:g}, but data.loss=multi_label needs 0 or "
                    "1 for every output, [N, outputs]"
                )
        found = prod(numbers.shape[1:])
        if self.classes is not None and found != self.classes:
            raise DataError(
                f"{where}: the target has {found} numbers a sample, but data.classes, the "
                f"number of outputs, is {self.classes}: set data.classes={found}"
            )
        return numbers

    def _labelled(self, samples: Samples, where: str) -> torch.Tensor:
        """Check targets of samples with many targets; ignored ones hold `IGNORED_TOKEN`."""
        target, wanted = samples.target, read_as(self.loss).each
        axes = 3 if self.loss == "pixel_classes" else 2
        if axes == 3 and target.dim() == 4 and target.shape[1] == 1:
            target = target[:, 0]
        if target.is_floating_point() or target.dim() != axes:
            raise DataError(
                f"{where}: the target holds {target.dtype} numbers of shape "
                f"{tuple(target.shape)}; data.loss={self.loss} needs whole numbers, {wanted}"
            )
        labels = target.long()
        counted = labels != IGNORED_TOKEN
        if self.loss == "next_token":
            counted[:, 0] = False  # no token before it could predict it
        if not bool(counted.any()):
            raise DataError(
                f"{where}: every target is {IGNORED_TOKEN}, which the loss ignores, so nothing "
                "can be learnt from these samples. Leave them out."
            )
        self._require_range(labels[labels != IGNORED_TOKEN], where)
        mask = samples.inputs.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            idle = int((counted & (mask == 0)).sum())
            if idle:
                raise DataError(
                    f"{where}: {idle} tokens of padding (attention_mask is 0) have a label: "
                    f"write {IGNORED_TOKEN} there, which the loss ignores"
                )
        return labels

    def _labels(self, target: torch.Tensor, where: str) -> torch.Tensor:
        if target.dim() == 2 and target.shape[1] == 1:
            target = target[:, 0]
        if target.dim() != 1:
            raise DataError(
                f"{where}: the target has shape {tuple(target.shape)}, but one class for each "
                "sample, [N], is needed. Convert one-hot rows by target.argmax(1), or set "
                "data.loss: squared_error for several numbers, multi_label for several answers "
                "of 0 and 1, token_classes or pixel_classes for one class for each token or "
                "pixel."
            )
        if self.loss == "logistic" and is_binary(target):
            return target.long()
        if self.loss == "logistic" and target.is_floating_point():
            other = float(target[(target != 0) & (target != 1)][0])
            raise DataError(
                f"{where}: the target holds {other:g}, but data.loss=logistic needs 0 or 1 for "
                "each sample (convert -1 and 1 by target > 0)"
            )
        if target.is_floating_point():
            raise DataError(
                f"{where}: the target holds {target.dtype} numbers, such as "
                f"{float(target[0]):g}; class labels must be whole numbers from 0. Convert "
                "classes to int64; for numbers to predict set data.loss=squared_error."
            )
        labels = target.long()
        if self.classes is not None or bool((labels < 0).any()):
            self._require_range(labels, where)
        return labels

    def _require_range(self, labels: torch.Tensor, where: str) -> None:
        classes = 2 if self.loss == "logistic" else self.classes
        least, most = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if least < 0 or (classes is not None and most >= classes):
            bounds = "from 0 on" if classes is None else f"0 to {classes - 1}"
            if read_as(self.loss).each:
                bounds += f" ({IGNORED_TOKEN}: no loss)"
            mend = "" if least < 0 or self.loss == "logistic" else f", or data.classes={most + 1}"
            raise DataError(
                f"{where}: the labels go from {least} to {most}, but must be {bounds}: number "
                f"the classes from 0{mend}"
            )


def gathered(found: object, where: str) -> Samples:
    """Convert what a file or a function returns to samples, and name the original types.

    Args:
        found: `Samples`, or (inputs, target) where inputs are one array or a dict of arrays.
        where: For messages.

    Raises:
        DataError: If it is something else, or the numbers of inputs and targets differ.
    """
    if isinstance(found, Samples):
        return gathered((found.inputs, found.target), where)
    if isinstance(found, tuple | list) and len(found) == 2:
        inputs = found[0] if isinstance(found[0], dict) else {"x": found[0]}
        tensors = {str(n): as_tensor(a, f"{where}: {n}") for n, a in inputs.items()}
        samples = Samples(tensors, as_tensor(found[1], f"{where}: the target"))
    else:
        raise DataError(
            f"{where} returns a {type(found).__name__}, but must return (inputs, target). Return "
            "texts or other objects for your training function as a datasets.Dataset (from_list "
            "makes one)."
        )
    for name, tensor in samples.tensors.items():
        if not tensor.dim():
            raise DataError(f"{where}: {name} is a single number, but must be an array of samples")
        if len(tensor) and not tensor.numel():
            shape = tuple(tensor.shape)
            raise DataError(f"{where}: {name} of shape {shape} has no values for a sample")
    sizes = {name: len(tensor) for name, tensor in samples.inputs.items()}
    if not len(samples) or {*sizes.values()} != {len(samples)}:
        raise DataError(
            f"{where}: there are {len(samples)} targets, but inputs of {sizes} samples. Give as "
            "many of each, and at least one."
        )
    return samples


def as_tensor(value: Any, where: str) -> torch.Tensor:
    """Convert an array, a list or a column of a table to a tensor.

    Raises:
        DataError: If it does not hold real numbers, or not all of them.
    """
    if isinstance(value, torch.Tensor):
        return _plain(value.detach(), where)
    if is_masked(value):
        raise DataError(
            f"{where} is a masked array with missing values: fill them (.filled(number)), or "
            "leave the rows out"
        )
    try:
        array = np.array(value)
    except Exception as error:  # a user's type may raise anything
        raise DataError(f"{where} is not an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{where} holds {_kind(array)}, but must hold numbers. Encode words as numbers, or "
            "use data=table, which does so."
        )
    if array.dtype.itemsize > 8:
        raise DataError(
            f"{where} holds {array.dtype} numbers, but float64 is the widest type supported"
        )
    if array.dtype.kind == "u" and array.size and int(array.max()) > LARGEST_INTEGER:
        raise DataError(
            f"{where} holds {int(array.max())}, which does not fit into int64: use smaller ids"
        )
    native = array.astype(WIDER.get(array.dtype.name, array.dtype.newbyteorder("=")))
    return torch.from_numpy(native)


def is_masked(value: object) -> bool:
    """Return whether an array, or one inside a list or dict, has masked values."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        return any(map(is_masked, value))
    return isinstance(value, np.ma.MaskedArray) and bool(np.ma.is_masked(value))


def _plain(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Copy a tensor into memory as plain numbers, of a type that torch supports."""
    kind = tensor.layout if tensor.layout != torch.strided else tensor.device.type
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        mend = "load its numbers first" if tensor.is_meta else "make it a dense one first"
        raise DataError(f"{where} is a tensor of kind {kind}: {mend}")
    if tensor.is_complex():
        raise DataError(f"{where} holds complex numbers, but must hold real ones")
    wider = WIDER.get(str(tensor.dtype).removeprefix("torch."))
    return as_tensor(tensor.numpy(), where) if wider and tensor.device.type == "cpu" else tensor


def _kind(array: np.ndarray[Any, Any]) -> str:
    kinds = {"U": "words", "S": "words", "O": "Python objects", "c": "complex numbers"}
    return kinds.get(array.dtype.kind, f"values of type {array.dtype}")


def scale_of_bytes(samples: Samples) -> dict[str, object]:
    """Return the scaling that `SampleSpec.validate` applies to images (`DataSet.reading`)."""
    if set(samples.inputs) != {"x"} or samples.inputs["x"].dtype != torch.uint8:
        return {}
    return {"subtract": 0.0, "divide_by": 255.0}


def describe_inputs(came: Samples, fitted: Samples) -> dict[str, object]:
    """Describe how ``x`` was converted to float32."""
    if set(came.inputs) != {"x"}:
        return {}
    kinds = [str(t.inputs["x"].dtype).removeprefix("torch.") for t in (came, fitted)]
    if kinds == ["float32"] * 2:
        return {}
    if not fitted.inputs["x"].is_floating_point():
        return {"inputs": f"{kinds[0]} as given"}
    became = "scaled to 0..1" if scale_of_bytes(came) else f"converted to {kinds[1]}"
    return {"inputs": f"{kinds[0]} {became}"}


def scale_of(rows: torch.Tensor) -> dict[str, Any]:
    """Compute columns' means and standard deviations, in float64; a deviation of 0 counts as 1."""
    rows = rows.double()
    spread = rows.std(dim=0, correction=0)
    spread = torch.where(spread == 0, torch.ones_like(spread), spread)
    return {"subtract": rows.mean(dim=0).tolist(), "divide_by": spread.tolist()}


def as_scaled(values: torch.Tensor, scale: Mapping[str, Any]) -> torch.Tensor:
    """Standardize by the means and deviations of `scale_of`; float64."""
    mean, spread = (torch.tensor(scale[k], dtype=torch.float64) for k in ("subtract", "divide_by"))
    return (values.double() - mean) / spread


def as_unscaled(values: torch.Tensor, scale: Mapping[str, Any]) -> torch.Tensor:
    """Undo `as_scaled`; float64."""
    mean, spread = (torch.tensor(scale[k], dtype=torch.float64) for k in ("subtract", "divide_by"))
    return values.double() * spread + mean


def found_shape(samples: Samples) -> tuple[int, ...]:
    """Return the shape of one input ``"x"``; empty if inputs have other names (token ids)."""
    return tuple(samples.inputs["x"].shape[1:]) if set(samples.inputs) == {"x"} else ()


def outputs_for(tables: Sequence[Samples], loss: str) -> int | None:
    """Count the outputs that the targets need; None if they do not determine it."""
    if read_as(loss).numbers:
        return max(1, tables[0].target[0].numel())
    if loss == "next_token" or any(t.target.is_floating_point() for t in tables):
        return None  # for one column, the form reports the error
    return max(2, 1 + max(int(t.target.max()) for t in tables))


def read_npz(path: Path, where: str) -> Samples:
    """Read the arrays of a ``.npz`` file: the target, and the inputs by their names.

    Raises:
        DataError: If it cannot be read, or has no target or no inputs.
    """
    do = (
        "write one with numpy.savez(path, x=..., target=...), or name a function that reads it. "
        "For a table (CSV, Parquet) to divide among clients use data=table"
    )
    arrays = read_arrays(path, do, where)
    if "target" not in arrays or len(arrays) < 2:
        raise DataError(
            f"{where}: {path} holds {[*arrays]}, but needs target, and x (or the inputs of the "
            "model by name)"
        )
    target = arrays.pop("target")
    return gathered((arrays, target), where)
