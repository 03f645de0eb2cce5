"""Data sets, by name: sources -> encoders -> one split -> clients.

==================  ===============================================================================
`sources`           one file a data source: its keys, and where its samples come from
`tables`, `npz`     read files: the one reader of tables, and arrays
`encoders`          make tensors of what was read: arrays, tables of numbers, texts, chats
`split`             which rows are trained on, and which are measured on
`dataset`           `DataSet`: samples, and what a model and a partition need to know of them
`partition`         divides rows among clients, in the ways of `partitioners`
`clients`           `ClientData`: the samples of all clients, from any source; `per_client` reads
                    the clients' own samples, `client_law` draws virtual ones
`client_split`      splits a client's samples for federated evaluation
==================  ===============================================================================

A new source is a file in `sources` and a row in `DATASETS` (CONTRIBUTING, "A new data source").
`task` defines the learning task and its losses, with the user's own (`own_loss`) and those of
language models (`token_losses`); `objective` chooses the loss. `locate` finds files.
"""

from __future__ import annotations

from collections.abc import Callable

from fedraclora.data.dataset import DataSet, select_labels
from fedraclora.data.partition import PARTITIONS, make_partition
from fedraclora.data.sources.arrays import load_arrays
from fedraclora.data.sources.digits import load_digits
from fedraclora.data.sources.fedprox_synthetic import fedprox_synthetic
from fedraclora.data.sources.glue_instructions import load_glue_instructions
from fedraclora.data.sources.instructions import load_instructions
from fedraclora.data.sources.mnist import load_mnist, load_mnist_5k
from fedraclora.data.sources.own import own_samples
from fedraclora.data.sources.program import load_function, registered_data
from fedraclora.data.sources.shakespeare import load_shakespeare
from fedraclora.data.sources.synthetic import least_squares, logistic_regression
from fedraclora.data.sources.table import load_table
from fedraclora.data.sources.text import load_text
from fedraclora.data.sources.virtual import virtual
from fedraclora.data.split import hold_out

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
    "object": registered_data,
    "function": load_function,
    "instructions": load_instructions,
    "glue_instructions": load_glue_instructions,
}
