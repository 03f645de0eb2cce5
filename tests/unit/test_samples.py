"""Samples and their division among clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedraclora.data.clients import PartitionedData, count_labels
from fedraclora.data.samples import Samples
from fedraclora.errors import DataError

TABLE = Samples({"x": torch.arange(10.0).reshape(5, 2)}, torch.arange(5) * 10)
# Client 0 holds rows 4 and 0, client 1 none, client 2 rows 2, 2 and 1 (a row may be shared).
PARTS = [np.array([4, 0]), np.array([], dtype=np.int64), np.array([2, 2, 1])]


def test_take_keeps_rows_together() -> None:
    taken = TABLE.take(torch.tensor([3, 1]))
    assert len(TABLE) == 5
    assert len(taken) == 2
    assert taken.inputs["x"].tolist() == [[6, 7], [2, 3]]
    assert taken.target.tolist() == [30, 10]


def test_moving_to_a_precision_leaves_integers_alone() -> None:
    ids = torch.zeros(2, dtype=torch.int64)
    table = Samples({"x": torch.zeros(2, 3), "ids": ids}, torch.ones(2))
    moved = table.to("cpu", torch.float64)
    assert moved.inputs["x"].dtype == torch.float64
    assert moved.inputs["ids"].dtype == torch.int64
    assert moved.target.dtype == torch.float64
    assert table.to("cpu").inputs["x"].dtype == torch.float32


def test_a_partition_knows_its_sizes() -> None:
    data = PartitionedData.of(TABLE, PARTS)
    assert data.num_clients == 3
    assert data.sizes(torch.tensor([2, 0, 1])).tolist() == [3, 2, 0]


def test_gather_takes_positions_in_the_client() -> None:
    data = PartitionedData.of(TABLE, PARTS)
    batch = data.gather(torch.tensor([2, 0]), torch.tensor([[2, 0], [1, 0]]))
    assert batch.target.tolist() == [10, 20, 0, 40]
    assert batch.inputs["x"][:, 0].tolist() == [2, 4, 0, 8]


def test_gather_allows_padding_past_the_last_client() -> None:
    data = PartitionedData.of(TABLE, PARTS)
    batch = data.gather(torch.tensor([2]), torch.tensor([[0, 7]]))
    assert len(batch) == 2
    assert batch.target[0] == 20


def test_a_client_is_its_rows_in_stored_order() -> None:
    data = PartitionedData.of(TABLE, PARTS)
    assert data.client(0).target.tolist() == [40, 0]
    assert data.client(2).target.tolist() == [20, 20, 10]
    assert len(data.client(1)) == 0


def test_moving_a_partition_moves_its_samples() -> None:
    data = PartitionedData.of(TABLE, PARTS).to("cpu", torch.float64)
    assert data.samples.inputs["x"].dtype == torch.float64
    assert data.rows.dtype == torch.int64
    assert data.client(0).inputs["x"].tolist() == [[8, 9], [0, 1]]


@pytest.mark.parametrize("rows", [[5], [-1], [0, 99]])
def test_a_row_outside_the_table_is_refused(rows: list[int]) -> None:
    with pytest.raises(DataError, match=r"0\.\.4"):
        PartitionedData.of(TABLE, [np.array(rows)])


def test_a_partition_needs_a_client() -> None:
    with pytest.raises(DataError, match="at least one client"):
        PartitionedData.of(TABLE, [])


def padded(target: torch.Tensor) -> Samples:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    ids = torch.arange(12).reshape(3, 4)
    return Samples({"input_ids": ids, "attention_mask": mask, "genre": ids[:, 0]}, target)


def test_lengths_end_at_the_last_token_that_is_read() -> None:
    samples = padded(torch.zeros(3))
    assert samples.lengths is not None
    assert samples.lengths.tolist() == [2, 3, 0]
    assert samples.padded == 4
    assert TABLE.lengths is None
    assert TABLE.padded == 0


def test_trim_cuts_tokens_and_nothing_else() -> None:
    classes = padded(torch.zeros(3)).trim(3)
    assert {k: tuple(v.shape) for k, v in classes.inputs.items()} == {
        "input_ids": (3, 3),
        "attention_mask": (3, 3),
        "genre": (3,),
    }
    assert padded(torch.zeros(3, 4, dtype=torch.int64)).trim(3).target.shape == (3, 3)
    assert padded(torch.zeros(3)).trim().padded == 3
    assert padded(torch.zeros(3, 4)).trim(3).target.shape == (3, 4)  # four scores, no tokens


@pytest.mark.parametrize("length", [0, 4, 9])
def test_trim_leaves_alone_what_cannot_be_cut(length: int) -> None:
    samples = padded(torch.zeros(3))
    assert samples.trim(length) is samples
    assert TABLE.trim(length) is TABLE


def test_a_partition_knows_the_lengths_of_its_samples() -> None:
    data = PartitionedData.of(padded(torch.zeros(3)), [np.array([2, 0]), np.array([1])])
    clients, positions = torch.tensor([1, 0]), torch.tensor([[[0, 9]], [[1, 0]]])
    lengths = data.lengths(clients, positions)
    assert lengths is not None
    assert lengths.tolist() == [[[3, 3]], [[2, 0]]]
    assert PartitionedData.of(TABLE, PARTS).lengths(clients, positions) is None


def test_labels_are_counted_for_the_clients_that_are_asked_for() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    parts = [rng.integers(0, 200, n) for n in rng.integers(0, 9, 50)]
    assert any(not len(part) for part in parts)
    data = PartitionedData.of(Samples({"x": torch.zeros(200, 1)}, torch.from_numpy(labels)), parts)
    asked = [49, 3, *range(10, 45), 3]
    counts = count_labels(data, torch.tensor(asked), 4)
    wanted = [np.bincount(labels[parts[k]], minlength=4) for k in asked]
    assert counts.tolist() == np.array(wanted).tolist()
    assert count_labels(data, torch.tensor([], dtype=torch.int64), 4).shape == (0, 4)
