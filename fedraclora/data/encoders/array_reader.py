"""Read new arrays for a finished run, as its own samples were read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedraclora.data.dataset import EncodedSamples
from fedraclora.data.encoders.array import (
    SampleSpec,
    as_scaled,
    as_tensor,
)
from fedraclora.data.encoders.labels import (
    target_of,
)
from fedraclora.data.encoders.program import TARGET_NAMES, is_columns, table_of
from fedraclora.data.npz import AnyArray, read_arrays, taken
from fedraclora.data.samples import Samples
from fedraclora.errors import DataError


def channels_first(x: AnyArray) -> AnyArray:
    """Images [N, H, W] become [N, 1, H, W], and [N, H, W, C] becomes [N, C, H, W]."""
    if x.ndim == 3 and x.dtype == np.uint8:
        return x[:, None]
    colours = (1, 3, 4)
    if x.ndim == 4 and x.shape[-1] in colours and x.shape[1] not in colours:
        return np.moveaxis(x, -1, 1)
    return x


@dataclass(frozen=True)
class ArrayReader:
    """Read arrays as a run read its own samples; see `fedraclora.data.dataset.SampleReader`.

    Attributes:
        form: The form of the run's samples.
        numbered: Whether targets are indices of class names, as in a program's data; else they are
            names.
        column: The column to predict of a Hugging Face ``Dataset``, or None.
    """

    form: SampleSpec
    numbered: bool
    column: str | None = None

    def __call__(
        self, found: Any, reading: Mapping[str, Any], *, target: bool = True
    ) -> EncodedSamples:
        """Read a ``.npz`` file, ``(inputs, target)``, or a data set of torch or Hugging Face."""
        where = "data"
        if isinstance(found, Path):
            found, where = _from_file(found, target=target), str(found)
        names = [str(name) for name in reading.get("classes", [])]
        form = replace(self.form, classes=len(names)) if names else self.form
        if target:
            if isinstance(found, tuple | list) and len(found) == 2:
                found = found[0], self._numbered(found[1], names)
            samples = table_of(found, where, self.column)
        else:
            samples = _inputs_of(found, where, self.column)
            form = replace(form, loss=":", classes=None)  # which accepts any target
        inputs = {n: self._raw(n, t, reading, where) for n, t in samples.inputs.items()}
        fitted = form.validate(Samples(inputs, samples.target), where)
        return EncodedSamples(fitted, np.arange(len(fitted)), len(fitted))

    def _numbered(self, target: Any, names: list[str]) -> Any:
        """Convert targets that are names of classes to indices."""
        array = np.asarray(target)
        if not names or array.dtype.kind not in "biuUSO" or array.size != len(array):
            return target
        if self.numbered and array.dtype.kind in "biu":
            return target
        return target_of([str(name) for name in array.ravel().tolist()], names)

    def _raw(
        self, name: str, value: torch.Tensor, reading: Mapping[str, Any], where: str
    ) -> torch.Tensor:
        """Convert inputs to the shape and scale that the run's inputs had in their source."""
        if name != "x":
            return value
        if self.form.shape and tuple(value.shape[1:]) != self.form.shape:
            turned = torch.from_numpy(np.ascontiguousarray(channels_first(value.numpy())))
            value = turned if tuple(turned.shape[1:]) == self.form.shape else value
        if "subtract" not in reading:
            if value.dtype == torch.uint8 and self.form.shape:
                raise DataError(
                    f"{where}: x holds bytes, but the run was trained on other numbers: give "
                    "them in the run's type"
                )
            return value
        if value.is_floating_point() and len(value) and float(value.max()) <= 1.0:
            scale = np.ravel(reading["divide_by"])
            raise DataError(
                f"{where}: x goes up to {float(value.max()):g}, so it seems to be scaled "
                f"already. Give raw values: the run divides by {scale[0]:g} itself."
            )
        return as_scaled(value, reading).float()


def _from_file(path: Path, *, target: bool) -> Any:
    """Read inputs, and the target if needed, from a ``.npz`` file."""
    rest = read_arrays(path, "give one with x (or the inputs of the model by name) and target")
    names = [*rest]
    found = taken(rest, path)
    if both := [name for name in ("test_x", "test_target") if name in found]:
        raise DataError(
            f"{path} holds {both[0]} beside other samples: write one set of samples into a file"
        )
    if target and "target" not in found:
        raise DataError(f"{path} holds {names}, but no target to evaluate on")
    inputs = {"x": found["x"]} if "x" in found else rest
    if not inputs:
        raise DataError(f"{path} holds no inputs: add x, or the inputs of the model by name")
    return (inputs, found["target"]) if target else inputs


def _inputs_of(found: Any, where: str, column: str | None) -> Samples:
    """Read inputs only: arrays, the first of a pair, or a data set without its target."""
    if is_columns(found):
        known = [n for n in (column, *TARGET_NAMES) if n in found.column_names]
        found = found if known else found.add_column(TARGET_NAMES[0], [0] * len(found))
        column = next(iter(known), None)
    if is_columns(found) or isinstance(found, torch.utils.data.Dataset):
        tensors = table_of(found, where, column).inputs
    else:
        found = found[0] if isinstance(found, tuple) and len(found) == 2 else found
        inputs = found if isinstance(found, dict) else {"x": found}
        tensors = {str(name): as_tensor(each, f"{where}: {name}") for name, each in inputs.items()}
    sizes = {name: len(tensor) if tensor.dim() else 0 for name, tensor in tensors.items()}
    if len({*sizes.values()}) != 1 or 0 in sizes.values():
        raise DataError(f"{where}: the inputs have {sizes} samples, but need as many of each")
    return Samples(tensors, torch.zeros(next(iter(sizes.values())), dtype=torch.int64))
