"""Data sets, by name."""

from __future__ import annotations

from collections.abc import Callable

from fedraclora.data.arrays import load_arrays
from fedraclora.data.dataset import DataSet, hold_out, select_labels
from fedraclora.data.digits import load_digits
from fedraclora.data.fedprox_synthetic import fedprox_synthetic
from fedraclora.data.glue_instructions import load_glue_instructions
from fedraclora.data.instructions import load_instructions
from fedraclora.data.mnist import load_mnist, load_mnist_5k
from fedraclora.data.objects import lent_data, load_function
from fedraclora.data.own_set import own_samples
from fedraclora.data.partition import PARTITIONS, make_partition
from fedraclora.data.shakespeare import load_shakespeare
from fedraclora.data.synthetic import least_squares, logistic_regression
from fedraclora.data.tabular import load_table
from fedraclora.data.text import load_text
from fedraclora.data.virtual import virtual

__all__ = ["DATASETS", "PARTITIONS", "DataSet", "hold_out", "make_partition", "select_labels"]

DATASETS: dict[str, Callable[..., DataSet]] = {
    "digits": load_digits,
    "mnist_5k": load_mnist_5k,
    "mnist": load_mnist,
    "least_squares": least_squares,
    "logistic_regression": logistic_regression,
    "fedprox_synthetic": fedprox_synthetic,
    "text": load_text,
    "table": load_table,
    "arrays": load_arrays,
    "shakespeare": load_shakespeare,
    "virtual": virtual,
    "own": own_samples,
    "object": lent_data,
    "function": load_function,
    "instructions": load_instructions,
    "glue_instructions": load_glue_instructions,
}
