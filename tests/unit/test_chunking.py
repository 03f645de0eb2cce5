"""How many clients train as one batch."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from fedraclora.chunking import BUDGET_BYTES, LARGEST, client_bytes, resolve_chunk
from fedraclora.method import Downlink, Trained
from fedraclora.optimiser import LocalConfig
from fedraclora.samples import Partitioned, Samples
from fedraclora.task import Task


def task() -> Task:
    """7 -> 6 -> 4 in float32: a sample leaves 6 + 6 + 4 numbers behind."""
    model = nn.Sequential(OrderedDict(fc=nn.Linear(7, 6), act=nn.ReLU(), head=nn.Linear(6, 4)))
    samples = Samples({"x": torch.zeros(5, 7)}, torch.zeros(5, dtype=torch.int64))
    data = Partitioned.of(samples, [np.arange(3), np.arange(3, 5)])
    return Task(model, ("head",), "cross_entropy", ("loss",), data, samples)


DOWN = Downlink(dense={"a": Trained((6, 7)), "b": Trained((3,))})


def test_a_client_costs_its_activations_and_its_tensors() -> None:
    trained = 4 * 4 * (42 + 3)
    assert client_bytes(task(), DOWN, LocalConfig(batch_size=10)) == 16 * 4 * 10 + trained
    # A full batch is not known here: 32 samples stand for it.
    assert client_bytes(task(), DOWN, LocalConfig(batch_size=0)) == 16 * 4 * 32 + trained


def test_measuring_leaves_the_model_as_it_was() -> None:
    whole = task()
    for training in (True, False):
        whole.model.train(training)
        client_bytes(whole, DOWN, LocalConfig())
        assert whole.model.training == training
        assert all(not m._forward_hooks for m in whole.model.modules())
    assert all(p.grad is None for p in whole.model.parameters())


@pytest.mark.parametrize(("chunk", "cohort", "wanted"), [(3, 10, 3), (30, 10, 10), (1, 1, 1)])
def test_a_number_is_taken_as_it_is_up_to_the_cohort(chunk: int, cohort: int, wanted: int) -> None:
    assert resolve_chunk(chunk, task(), DOWN, LocalConfig(), cohort) == wanted


def test_auto_is_bounded_by_the_cohort_and_by_a_largest_chunk() -> None:
    assert resolve_chunk("auto", task(), DOWN, LocalConfig(), 5) == 5
    assert resolve_chunk("auto", task(), DOWN, LocalConfig(), 10**6) == LARGEST


def test_auto_fits_the_budget() -> None:
    wide = Downlink(dense={"a": Trained((1024, 1024))})  # 16 MiB a client, and a little
    found = resolve_chunk("auto", task(), wide, LocalConfig(), 1000)
    assert found == BUDGET_BYTES["cpu"] // client_bytes(task(), wide, LocalConfig()) == 15


def test_a_client_that_does_not_fit_trains_alone() -> None:
    huge = Downlink(dense={"a": Trained((1 << 20, 1 << 10))})
    assert resolve_chunk("auto", task(), huge, LocalConfig(), 100) == 1


def test_auto_is_a_function_of_model_and_data_alone() -> None:
    chunks = {resolve_chunk("auto", task(), DOWN, LocalConfig(), 77) for _ in range(3)}
    assert chunks == {77}
