"""Load arrays of samples, such as images: a ``.npz`` file, or a folder of IDX files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedraclora.data.dataset import DataSet, take
from fedraclora.data.encoders.array import (
    SampleSpec,
    describe_inputs,
    found_shape,
    gathered,
    scale_of_bytes,
)
from fedraclora.data.encoders.array_reader import channels_first
from fedraclora.data.encoders.labels import (
    OBJECTIVES,
    OF_ARRAYS,
    ArrayTask,
    as_values,
    class_names,
    supervised,
    target_of,
)
from fedraclora.data.locate import Root, resolve
from fedraclora.data.npz import AnyArray, read_arrays, taken
from fedraclora.data.samples import Samples
from fedraclora.data.sources.mnist import parse_idx, read_packed
from fedraclora.data.split import holdout_of
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import Fraction, limited

IDX = {
    "x": ("train-images",),
    "target": ("train-labels",),
    "test_x": ("t10k-images", "test-images"),
    "test_target": ("t10k-labels", "test-labels"),
}


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
            have ``x_test`` and ``target_test``, and ``client``, each sample's client; or a folder
            with IDX files for ``train`` and ``t10k``, packed by gzip or not. A path (also relative
            to ``root``) or ``package:NAME/path``.
        root: The folder that paths may be relative to, or None.
        test_file: A ``.npz`` file of test samples, if ``file`` has none.
        test_fraction: Without test samples, the fraction to hold out, per class; None: 0.2.
        split_seed: Seed of that split.
        task: ``classification``, ``regression``, ``multi_label`` (0 or 1 for every output) or
            ``pixel_classes`` (a class for each pixel).
        metrics: Names of metrics, the primary one first; None for those usual for the task.

    Returns:
        Inputs ``"x"`` float32: images of bytes from 0 to 1, with channels first. Classes are
        numbered in the sorted order of their names.

    Raises:
        ConfigError: If a key is wrong, naming it.
        DataError: If a file is missing or invalid.
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
    info = {"source": str(file)} | describe_inputs(raw, train)
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
    do = "give an .npz file or a folder of IDX files; for CSV and Parquet use data=table"
    arrays = read_arrays(path, do)
    names = [*arrays]
    found = taken(arrays, path)
    _require_pairs(found, path, names)
    return found


def read_folder(folder: Path) -> dict[str, AnyArray]:
    """Read the IDX files of a folder, selected by the start of their names.

    Raises:
        DataError: If there are none, two for one purpose, or one is damaged.
    """
    found: dict[str, AnyArray] = {}
    names = sorted(file.name for file in folder.iterdir() if "-ubyte" in file.name)
    for name, words in IDX.items():
        # A raw file beside its packed copy counts once.
        there = {file.removesuffix(".gz"): file for file in names if any(w in file for w in words)}
        if len(there) > 1:
            raise DataError(f"{folder}: each of {sorted(there)} could be {name}: keep one of them")
        for file in there.values():
            found[name] = parse_idx(read_packed(folder / file), str(folder / file))
    _require_pairs(found, folder, names)
    return found


def _require_pairs(found: dict[str, AnyArray], path: Path, names: list[str]) -> None:
    required = ["x", "target"] + ["test_x", "test_target"] * any("test" in name for name in found)
    if missing := [name for name in required if name not in found]:
        raise DataError(
            f"{path} holds {names}, but nothing for {missing[0]}. An .npz file needs the arrays "
            "x and target (x_test, target_test and client are optional), a folder the IDX files "
            "train-images... and train-labels..."
        )


def _classes(target: AnyArray, task: str, source: str) -> list[str]:
    """Name the classes; empty for a regression."""
    if task != "classification" or target.dtype.kind not in "biuUS":
        return []  # the latter are refused where they are fitted, in words
    names = class_names([str(label) for label in np.unique(target)])
    if len(names) < 2:
        raise DataError(
            f"{source}: every target is {names}, so there is nothing to learn. Give two or more "
            "different ones."
        )
    return names


def _samples(x: AnyArray, target: AnyArray, names: list[str], source: str) -> Samples:
    """Put channels first, and convert labels to class indices."""
    if names and target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if names and target.ndim == 1:
        target = target_of([str(label) for label in target.tolist()], names).numpy()
    return gathered((channels_first(x), target), source)


def _owners(arrays: dict[str, AnyArray], samples: int, source: str) -> AnyArray | None:
    owners = arrays.get("client")
    if owners is not None and owners.shape != (samples,):
        raise DataError(
            f"{source}: client has shape {owners.shape}, but needs one value for each of the "
            f"{samples} samples"
        )
    return owners
