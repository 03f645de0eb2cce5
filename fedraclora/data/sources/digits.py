"""The digits of scikit-learn: 1,797 images of 8 x 8, always available."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from fedraclora.data.dataset import NUMERIC, UNDIVIDED, DataSet, classification, take
from fedraclora.data.locate import package_path
from fedraclora.data.samples import Samples
from fedraclora.data.split import Holdout
from fedraclora.limits import Fraction, limited

DIGITS_FILE = "datasets/data/digits.csv.gz"


@NUMERIC
@UNDIVIDED
@limited("data")
def load_digits(*, test_fraction: Fraction = 0.25, split_seed: int = 0) -> DataSet:
    """Load the digits that come with scikit-learn.

    Too small to tell low-rank methods apart; for first runs and tests.

    Args:
        test_fraction: Fraction held out for the test, per class.
        split_seed: Seed of that split; independent of the run's seed, so that all runs of a
            comparison are measured on the same samples.

    Returns:
        Inputs ``"x"`` float32 [N, 64] in [0, 1], ten classes.

    Raises:
        ConfigError: If ``test_fraction`` leaves one side empty.
    """
    images, labels = _read()
    samples = Samples(
        {"x": torch.from_numpy(images).to(torch.float32) / 16}, torch.from_numpy(labels).long()
    )
    kept, held = Holdout(test_fraction, split_seed).split(len(samples), labels=labels)
    scale: dict[str, object] = {"subtract": 0.0, "divide_by": 16.0}
    train, test = take(samples, kept), take(samples, held)
    return classification(train, test, 10, {"source": "scikit-learn digits"}, reading=scale)


@cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Read images and labels, once in a process.

    Reads scikit-learn's file: importing the library takes a second.
    """
    file = package_path("sklearn", DIGITS_FILE)
    if file is not None and file.is_file():
        table = np.loadtxt(file, delimiter=",")
        return table[:, :-1], table[:, -1]
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    return images, labels
