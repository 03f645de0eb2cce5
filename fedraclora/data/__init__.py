"""Data sets, by name, and the way from what there is to what clients train on.

==========================================  ==========================  ==========================
what comes in                               is read by                  and becomes samples by
==========================================  ==========================  ==========================
arrays: ``.npz``, IDX                       `arrays`                    `fit`
tables of numbers: CSV, Parquet, frames     `frames`                    `tabular`
tables of texts                             `frames`                    `text`, a tokenizer
conversations: JSONL, CSV, Parquet          `conversations`             `chat`, `instructions`
arrays and data sets of a Python program    `objects`, `tables`         `fit`
files or functions that each client has     `own`                       `fit`, `own_set`
a package, or numbers that are drawn        `digits`, `mnist`, `shakespeare`, `synthetic`, ...
==========================================  ==========================  ==========================

Each way ends in a `dataset.DataSet`: samples, and what a model and a partition need to know of
them. `partition` says whose each row is, in the ways of `partitioners`; what comes of that, as
clients made on demand (`virtual`) and samples that clients bring (`own`), is `samples.ClientData`.
`held` parts it into what a client trains on and what it alone measures on. What is learnt from
samples stands in `task`: its losses, with those of the user's own (`own_loss`) and for language
models (`token_losses`); `objective` finds out which is meant. `locate` finds files.
"""

from __future__ import annotations

from collections.abc import Callable

from fedraclora.data.arrays import load_arrays
from fedraclora.data.dataset import DataSet, select_labels
from fedraclora.data.digits import load_digits
from fedraclora.data.fedprox_synthetic import fedprox_synthetic
from fedraclora.data.glue_instructions import load_glue_instructions
from fedraclora.data.instructions import load_instructions
from fedraclora.data.mnist import load_mnist, load_mnist_5k
from fedraclora.data.objects import lent_data, load_function
from fedraclora.data.own_set import own_samples
from fedraclora.data.partition import PARTITIONS, make_partition
from fedraclora.data.shakespeare import load_shakespeare
from fedraclora.data.split import hold_out
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
