"""Arrays of samples, images for one: a ``.npz`` file, or a folder of IDX files like MNIST's.

Arrays that come after a run are read as its own were: one rule for every data set of numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.dataset import DataSet, Read, take
from fedraclora.data.fit import (
    SampleSpec,
    as_scaled,
    as_tensor,
    found_shape,
    gathered,
    said_of_inputs,
    scale_of_bytes,
)
from fedraclora.data.labels import (
    OBJECTIVES,
    OF_ARRAYS,
    ArrayTask,
    as_values,
    class_names,
    supervised,
    target_of,
)
from fedraclora.data.locate import Root, resolve, unread
from fedraclora.data.mnist import parse_idx, read_packed
from fedraclora.data.program import TARGET_NAMES, is_columns, table_of
from fedraclora.data.samples import Samples
from fedraclora.data.split import holdout_of
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import Fraction, limited

AnyArray = npt.NDArray[Any]

SPELLINGS = {
    "x": ("x", "X", "images", "x_train", "train_images"),
    "target": ("target", "y", "Y", "labels", "y_train", "train_labels"),
    "test_x": ("x_test", "test_x", "test_images"),
    "test_target": ("target_test", "y_test", "test_target", "test_labels"),
    "client": ("client",),
}
IDX = {
    "x": ("train-images",),
    "target": ("train-labels",),
    "test_x": ("t10k-images", "test-images"),
    "test_target": ("t10k-labels", "test-labels"),
}
# What numpy and zipfile raise where a file is damaged.
BROKEN_FILE = (OSError, ValueError, TypeError, EOFError, AttributeError, BadZipFile, zlib.error)


@limited("data")
def load_arrays(
    *,
    file: str | None = None,
    root: Root = None,
    test_file: str | None = None,
    test_fraction: Fraction | None = None,
    split_seed: int = 0,
    task: ArrayTask = "classification",
    metrics: Sequence[str] | None = None,
) -> DataSet:
    """Load arrays of inputs and targets.

    Args:
        file: A ``.npz`` file with ``x`` and ``target`` (or a usual spelling of them), which may
            have ``x_test`` and ``target_test``, and ``client``, whose each sample is; or a folder
            with IDX files for ``train`` and ``t10k``, packed by gzip or not. A path (also relative
            to ``root``) or ``package:NAME/path``.
        root: The folder that paths may be relative to, or None.
        test_file: A ``.npz`` file of test samples, where ``file`` has none.
        test_fraction: Without test samples, the fraction that is held out, per class; None for 0.2.
        split_seed: Seed of that choice.
        task: ``classification``, ``regression``, ``multi_label`` (0 or 1 for every output) or
            ``pixel_classes`` (a class for each pixel).
        metrics: Names of metrics, the headline first; None for those usual for the task.

    Returns:
        Inputs ``"x"`` float32: images of bytes from 0 to 1, with channels first. Classes are
        numbered in the sorted order of their names.

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If a file is missing, or not what it should be.
    """
    path = resolve(str(file or ""), key="data.file", root=root)
    arrays = read_folder(path) if path.is_dir() else read_file(path)
    source = f"data.file={file}"
    held = holdout_of(test_fraction, split_seed, test_file=test_file)
    if "test_x" in arrays and (test_file or test_fraction):
        said = f"test_file={test_file}" if test_file else f"test_fraction={test_fraction}"
        raise ConfigError(f"data.{said}, but {source} has test samples itself: leave it out")
    if test_file is not None:
        other = read_file(resolve(test_file, key="data.test_file", root=root))
        arrays |= {"test_x": other["x"], "test_target": other["target"]}
    names = _classes(arrays["target"], task, source)
    form = SampleSpec(None, (OBJECTIVES | OF_ARRAYS)[task][0])
    raw = _samples(arrays["x"], arrays["target"], names, source)
    train = form.validate(raw, source)
    info = {"source": str(file)} | said_of_inputs(raw, train)
    everyone = owners = _owners(arrays, len(train), source)
    if held is None or "test_x" in arrays:
        where = source if test_file is None else f"data.test_file={test_file}"
        form = replace(form, shape=found_shape(train))
        held_out = form.validate(
            _samples(arrays["test_x"], arrays["test_target"], names, where), where
        )
    else:
        labels = train.target.numpy() if task == "classification" else None
        kept, out = held.split(len(train), labels=labels)
        train, held_out = take(train, kept), take(train, out)
        info["held_out"] = held.fraction
        owners = owners if owners is None else owners[kept]
    return supervised(
        train,
        held_out,
        names,
        task,
        metrics=metrics,
        owners=owners,
        clients=everyone,
        info=info,
        reading=scale_of_bytes(raw)
        | ({"classes": as_values(names, arrays["target"])} if names else {}),
    )


def read_file(path: Path) -> dict[str, AnyArray]:
    """Read a ``.npz`` file; its arrays get the names ``x``, ``target``, ``test_x``, ...

    Raises:
        DataError: If it has no inputs or targets, or two arrays for one of them.
    """
    do = "one, or a folder of IDX files, is wanted; for CSV and Parquet there is data=table"
    arrays = read_arrays(path, do)
    names = [*arrays]
    found = taken(arrays, path)
    _require_pairs(found, path, names)
    return found


def read_arrays(path: Path, do: str, where: object = "data") -> dict[str, AnyArray]:
    """Read every array of a ``.npz`` file; of another ``do`` says what to do instead.

    Raises:
        DataError: If it is not there, no such file, or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{where}: there is no file {path}")
    if path.suffix.lower() != ".npz":
        raise DataError(f"{where}: {path.name} is no .npz file; {do}")
    try:
        # Pickles could run code; numpy does not close a damaged file that it has opened itself.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except BROKEN_FILE as error:
        raise unread(path, error) from error


def read_npz(path: Path, where: str) -> Samples:
    """Read the arrays of a ``.npz`` file: the target, and the inputs by their names.

    Raises:
        DataError: If it cannot be read, or has no target or no inputs.
    """
    do = (
        "write one with numpy.savez(path, x=..., target=...), or name a function that reads it. "
        "Tables (CSV, Parquet) that are to be divided among clients are for data=table"
    )
    arrays = read_arrays(path, do, where)
    if "target" not in arrays or len(arrays) < 2:
        raise DataError(
            f"{where}: {path} holds {[*arrays]}; target is wanted, and x (or the inputs of the "
            "model by name)"
        )
    target = arrays.pop("target")
    return gathered((arrays, target), where)


def taken(arrays: dict[str, AnyArray], path: Path) -> dict[str, AnyArray]:
    """Take the arrays of a usual spelling out of those of a file; give them their own names.

    Raises:
        DataError: If two could have one name.
    """
    found: dict[str, AnyArray] = {}
    for name, spellings in SPELLINGS.items():
        there = [spelling for spelling in spellings if spelling in arrays]
        if len(there) > 1:
            raise DataError(f"{path}: the arrays {there} could each be {name}; keep one of them")
        found |= {name: arrays.pop(there[0])} if there else {}
    return found


def read_folder(folder: Path) -> dict[str, AnyArray]:
    """Read the IDX files of a folder, by what their names begin with.

    Raises:
        DataError: If there are none, two for one purpose, or one is damaged.
    """
    found: dict[str, AnyArray] = {}
    names = sorted(file.name for file in folder.iterdir() if "-ubyte" in file.name)
    for name, words in IDX.items():
        # Raw beside packed is the same file twice.
        there = {file.removesuffix(".gz"): file for file in names if any(w in file for w in words)}
        if len(there) > 1:
            raise DataError(f"{folder}: {sorted(there)} could each be {name}; keep one of them")
        for file in there.values():
            found[name] = parse_idx(read_packed(folder / file), str(folder / file))
    _require_pairs(found, folder, names)
    return found


def _require_pairs(found: dict[str, AnyArray], path: Path, names: list[str]) -> None:
    required = ["x", "target"] + ["test_x", "test_target"] * any("test" in name for name in found)
    if missing := [name for name in required if name not in found]:
        raise DataError(
            f"{path} holds {names}, but nothing for {missing[0]}: a .npz file has arrays x and "
            "target (and perhaps x_test, target_test, client), a folder the files train-images... "
            "and train-labels... of IDX"
        )


def _classes(target: AnyArray, task: str, source: str) -> list[str]:
    """Name the classes; [] for a regression."""
    if task != "classification" or target.dtype.kind not in "biuUS":
        return []  # the latter are refused where they are fitted, in words
    names = class_names([str(label) for label in np.unique(target)])
    if len(names) < 2:
        raise DataError(
            f"{source}: every target is {names}, so that there is nothing to learn; two or more "
            "different ones are wanted"
        )
    return names


def _samples(x: AnyArray, target: AnyArray, names: list[str], source: str) -> Samples:
    """Put channels first, and number the labels."""
    if names and target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if names and target.ndim == 1:
        target = target_of([str(label) for label in target.tolist()], names).numpy()
    return gathered((channels_first(x), target), source)


def channels_first(x: AnyArray) -> AnyArray:
    """Images [N, H, W] become [N, 1, H, W], and [N, H, W, C] becomes [N, C, H, W]."""
    if x.ndim == 3 and x.dtype == np.uint8:
        return x[:, None]
    colours = (1, 3, 4)
    if x.ndim == 4 and x.shape[-1] in colours and x.shape[1] not in colours:
        return np.moveaxis(x, -1, 1)
    return x


def _owners(arrays: dict[str, AnyArray], samples: int, source: str) -> AnyArray | None:
    owners = arrays.get("client")
    if owners is not None and owners.shape != (samples,):
        raise DataError(
            f"{source}: client has shape {owners.shape}; one value for each of the {samples} "
            "samples is wanted"
        )
    return owners


@dataclass(frozen=True)
class ArrayReader:
    """Reads arrays as a run's own samples; see `fedraclora.data.dataset.SampleReader`.

    Attributes:
        form: Of the run's samples.
        numbered: Whether targets are places among the names of classes, as in a program's data;
            else they are names themselves.
        column: The column to predict of a Hugging Face ``Dataset``, or None.
    """

    form: SampleSpec
    numbered: bool
    column: str | None = None

    def __call__(self, found: Any, reading: Mapping[str, Any], *, target: bool = True) -> Read:
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
            form = replace(form, loss=":", classes=None)  # for which every target will do
        inputs = {n: self._raw(n, t, reading, where) for n, t in samples.inputs.items()}
        fitted = form.validate(Samples(inputs, samples.target), where)
        return Read(fitted, np.arange(len(fitted)), len(fitted))

    def _numbered(self, target: Any, names: list[str]) -> Any:
        """Number targets that are names of classes."""
        array = np.asarray(target)
        if not names or array.dtype.kind not in "biuUSO" or array.size != len(array):
            return target
        if self.numbered and array.dtype.kind in "biu":
            return target
        return target_of([str(name) for name in array.ravel().tolist()], names)

    def _raw(
        self, name: str, value: torch.Tensor, reading: Mapping[str, Any], where: str
    ) -> torch.Tensor:
        """Bring inputs to the shape and the scale of the run's, as these were in their source."""
        if name != "x":
            return value
        if self.form.shape and tuple(value.shape[1:]) != self.form.shape:
            turned = torch.from_numpy(np.ascontiguousarray(channels_first(value.numpy())))
            value = turned if tuple(turned.shape[1:]) == self.form.shape else value
        if "subtract" not in reading:
            if value.dtype == torch.uint8 and self.form.shape:
                raise DataError(
                    f"{where}: x holds bytes, but the run's own samples did not: give them as the "
                    "numbers that the run was trained on"
                )
            return value
        if value.is_floating_point() and len(value) and float(value.max()) <= 1.0:
            scale = np.ravel(reading["divide_by"])
            raise DataError(
                f"{where}: x goes up to {float(value.max()):g}, so that it seems scaled already; "
                f"give it raw, as the run's own samples were before they were divided by "
                f"{scale[0]:g}"
            )
        return as_scaled(value, reading).float()


def _from_file(path: Path, *, target: bool) -> Any:
    """Take inputs, and the target where one is wanted, from a ``.npz`` file."""
    rest = read_arrays(path, "one with x (or the inputs of the model by name) and target is wanted")
    names = [*rest]
    found = taken(rest, path)
    if both := [name for name in ("test_x", "test_target") if name in found]:
        raise DataError(f"{path} holds {both[0]} beside other samples: write one set into a file")
    if target and "target" not in found:
        raise DataError(f"{path} holds {names}, but no target to measure by")
    inputs = {"x": found["x"]} if "x" in found else rest
    if not inputs:
        raise DataError(f"{path} holds no inputs: x, or the inputs of the model by name, is wanted")
    return (inputs, found["target"]) if target else inputs


def _inputs_of(found: Any, where: str, column: str | None) -> Samples:
    """Take inputs alone: arrays, the first of a pair, or a data set, whose target is left aside."""
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
        raise DataError(f"{where}: the inputs have {sizes} samples; as many of each are wanted")
    return Samples(tensors, torch.zeros(next(iter(sizes.values())), dtype=torch.int64))
