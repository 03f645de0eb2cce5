"""Laws of data sets: splits, chosen labels, held-out samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedraclora.data import DATASETS, DataSet, hold_out, select_labels
from fedraclora.data.samples import Samples
from fedraclora.data.split import Holdout
from fedraclora.errors import ConfigError, FedRacLoraError


def table(labels: list[int], start: int = 0) -> Samples:
    x = torch.arange(start, start + 2 * len(labels), dtype=torch.float64).reshape(-1, 2)
    return Samples({"x": x}, torch.tensor(labels))


def data_set(labels: list[int], parts: list[list[int]] | None = None) -> DataSet:
    train = table(labels)
    return DataSet(
        train=train,
        test=table([0, 1, 2, 2], start=100),
        classes=3,
        loss="cross_entropy",
        metrics=("accuracy",),
        columns={"label": train.target.numpy(), "client": np.arange(len(labels)) * 10},
        sample_shape=(2,),
        parts=None if parts is None else [np.array(part) for part in parts],
        optimum=0.5,
    )


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=50)
def test_a_split_is_a_division_with_the_fraction_of_every_label(labels, fraction, seed):
    column, holdout = np.array(labels), Holdout(fraction, seed)
    counts = [int(fraction * labels.count(label) + 0.5) for label in set(labels)]
    if fraction and sum(counts) in {0, len(labels)}:
        with pytest.raises(ConfigError, match=r"data\.test_fraction=.*another fraction"):
            holdout.split(len(labels), labels=column)
        return
    kept, held = holdout.split(len(labels), labels=column)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(held) > 0).all()
    for label in set(labels):
        count = labels.count(label)
        assert abs((column[held] == label).sum() - fraction * count) <= 0.5 + 1e-9


def test_selected_labels_are_numbered_by_position_everywhere():
    data = data_set([0, 2, 1, 2, 0, 1], parts=[[0, 1], [2, 3], [4, 5]])
    chosen = select_labels(data, [2, 0])
    assert chosen.classes == 2
    assert chosen.train.target.tolist() == [1, 0, 0, 1]
    assert chosen.columns["label"].tolist() == [1, 0, 0, 1]
    assert chosen.columns["client"].tolist() == [0, 10, 30, 40]
    assert chosen.train.inputs["x"][:, 0].tolist() == [0.0, 2.0, 6.0, 8.0]
    assert chosen.test.target.tolist() == [1, 0, 0]
    assert [part.tolist() for part in chosen.parts or []] == [[0, 1], [2], [3]]
    assert chosen.optimum is None
    assert data.train.target.tolist() == [0, 2, 1, 2, 0, 1]


def test_five_to_nine_become_nought_to_four():
    data = select_labels(DATASETS["digits"](), [5, 6, 7, 8, 9])
    assert data.classes == 5
    assert sorted(set(data.train.target.tolist())) == [0, 1, 2, 3, 4]
    assert sorted(set(data.test.target.tolist())) == [0, 1, 2, 3, 4]


def test_held_out_samples_leave_the_training_samples():
    data = data_set([0, 1, 2] * 8, parts=[list(range(10)), list(range(10, 24))])
    rest, held = hold_out(data, 0.25, seed=3)
    assert held is not None
    assert sorted(held.target.tolist()) == [0, 0, 1, 1, 2, 2]
    first = {row[0] for row in rest.train.inputs["x"].tolist()}
    assert first | {row[0] for row in held.inputs["x"].tolist()} == set(range(0, 48, 2))
    assert len(rest.train) == 18
    assert len(first) == 18
    assert rest.columns["client"].tolist() == [5 * int(x) for x in rest.train.inputs["x"][:, 0]]
    assert rest.parts is not None
    assert sorted(np.concatenate(rest.parts).tolist()) == list(range(18))
    assert all(x < 20 for x in rest.train.inputs["x"][rest.parts[0], 0].tolist())
    assert rest.test is data.test
    assert rest.optimum is None


def test_whole_owners_are_held_out_where_the_test_set_has_owners_of_its_own():
    owners = np.repeat(np.array(list("abcdef")), 4)
    data = replace(data_set([0, 1, 2] * 8), held_out_by="owner")
    data = replace(data, columns=data.columns | {"owner": owners})
    rest, held = hold_out(data, 0.3, seed=3)
    assert held is not None
    assert len(held) == 8
    gone = owners[(held.inputs["x"][:, 0] / 2).long().numpy()]
    assert len(set(gone)) == 2
    assert not set(gone) & set(rest.columns["owner"])


def test_what_is_held_out_depends_on_the_seed_alone():
    data = data_set([0, 1, 2] * 8)
    one, two, other = (hold_out(data, 0.25, seed)[1] for seed in (3, 3, 4))
    assert one is not None
    assert two is not None
    assert other is not None
    assert torch.equal(one.inputs["x"], two.inputs["x"])
    assert not torch.equal(one.inputs["x"], other.inputs["x"])


def test_no_validation_changes_nothing():
    data = data_set([0, 1, 2])
    assert hold_out(data, 0.0, seed=1) == (data, None)


def test_a_test_set_that_is_the_training_set_stays_so():
    data = DATASETS["least_squares"](clients=3, samples=4, features=2)
    rest, _ = hold_out(data, 0.5, seed=0)
    assert rest.test is rest.train


BAD = {
    "label": (
        lambda: select_labels(data_set([0, 1, 2]), [1, 7]),
        r"data.labels.*\[7\].*\[0, 1, 2\]",
    ),
    "label twice": (lambda: select_labels(data_set([0, 1, 2]), [1, 1]), "different classes"),
    "one label": (lambda: select_labels(data_set([0, 1, 2]), [1]), "two or more"),
    "label of test": (
        lambda: select_labels(data_set([0, 1, 2, 3]), [0, 3]),
        r"no test sample has class \[3\]",
    ),
    "no classes": (
        lambda: select_labels(DATASETS["least_squares"](clients=1, samples=2, features=2), [0, 1]),
        "data.labels=null",
    ),
    "fraction": (lambda: hold_out(data_set([0, 1, 2]), 1.5, 0), "data.validation=1.5"),
    "nothing held": (lambda: hold_out(data_set([0, 1, 2]), 0.01, 0), "0 to validate on"),
}


@pytest.mark.parametrize(("call", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_the_key(call, words):
    with pytest.raises(ConfigError, match=words) as caught:
        call()
    assert isinstance(caught.value, FedRacLoraError)
