"""Laws of partitions: nothing twice, nothing lost in silence, a function of the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedraclora.data import PARTITIONS, DataSet, make_partition, partitioners
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.rng import generator

ARGS = {
    "iid": {},
    "dirichlet": {"alpha": 0.5},
    "pathological": {"classes_per_client": 2},
    "shards": {"shards_per_client": 2},
    "fedslop": {"alpha": 0.5},
}


def data_set(rows: int = 400, classes: int = 5, films: int = 9) -> DataSet:
    rng = np.random.default_rng(1)
    # Rows of a class lie together, as they do in many files.
    labels = np.sort(rng.integers(0, classes, rows))
    return DataSet(
        train=Samples({"x": torch.zeros(rows, 1)}, torch.from_numpy(labels)),
        test=Samples({"x": torch.zeros(1, 1)}, torch.zeros(1, dtype=torch.int64)),
        classes=classes,
        loss="cross_entropy",
        metrics=("accuracy",),
        columns={
            "label": labels,
            "film": np.array([f"film {k}" for k in rng.integers(0, films, rows)]),
        },
        sample_shape=(1,),
    )


DATA = data_set()


@pytest.mark.parametrize("name", ARGS)
@given(clients=st.integers(1, 12), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=8)
def test_a_partition_has_every_row_once(name, clients, seed):
    parts, info = make_partition(
        DATA, name=name, clients=clients, seed=seed, empty="drop", **ARGS[name]
    )
    rows = np.concatenate(parts)
    assert len(np.unique(rows)) == len(rows)
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert info["rows_left_out"] == len(DATA.train) - len(rows)
    assert info["clients"] == len(parts) == clients - info["clients_dropped"]
    sizes = [len(part) for part in parts]
    assert (info["samples_min"], info["samples_max"]) == (min(sizes), max(sizes))
    if name in {"iid", "dirichlet", "fedslop"}:
        assert info["rows_left_out"] == 0


@pytest.mark.parametrize("name", ARGS)
def test_a_partition_is_a_function_of_the_seed(name):
    one, two, other = (
        make_partition(DATA, name=name, clients=6, seed=seed, empty="drop", **ARGS[name])[0]
        for seed in (7, 7, 8)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert [a.tolist() for a in one] != [a.tolist() for a in other]


@pytest.mark.parametrize("name", ARGS)
def test_the_fast_way_and_the_public_way_agree(name, monkeypatch):
    fast, _ = make_partition(DATA, name=name, clients=6, seed=7, empty="drop", **ARGS[name])
    monkeypatch.setattr(partitioners, "getattr", lambda *_: None, raising=False)
    public, _ = make_partition(DATA, name=name, clients=6, seed=7, empty="drop", **ARGS[name])
    assert all(np.array_equal(a, b) for a, b in zip(fast, public, strict=True))


def test_iid_sizes_differ_by_one_and_rows_are_shuffled():
    parts, info = make_partition(DATA, name="iid", clients=7, seed=0)
    assert info["samples_max"] - info["samples_min"] == 1
    assert all(len(set(DATA.columns["label"][part])) == 5 for part in parts)


def test_small_alpha_is_skewed_and_large_alpha_is_even():
    def largest_share(alpha: float) -> float:
        parts, _ = make_partition(DATA, name="dirichlet", clients=5, seed=0, alpha=alpha)
        counts = [np.bincount(DATA.columns["label"][part], minlength=5) for part in parts]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.2) > 0.5
    assert largest_share(1000.0) < 0.3


def test_min_size_is_kept():
    _, info = make_partition(DATA, name="dirichlet", clients=5, seed=3, alpha=0.5, min_size=25)
    assert info["samples_min"] >= 25


def test_what_the_error_of_too_many_clients_proposes_works():
    asked = {"name": "dirichlet", "clients": 60, "seed": 0, "alpha": 0.05}
    with pytest.raises(ConfigError) as caught:
        make_partition(DATA, **asked)
    said = str(caught.value)
    assert "partition.alpha" in said.partition(":")[2]
    assert "fewer clients" in said
    assert "partition.min_size=0 partition.empty=drop" in said
    for change in ({"clients": 3}, {"alpha": 1000.0}, {"min_size": 0, "empty": "drop"}):
        make_partition(DATA, **asked | change)


def test_pathological_clients_have_few_classes_and_no_class_is_lost():
    parts, info = make_partition(DATA, name="pathological", clients=6, seed=2, classes_per_client=2)
    assert all(len(set(DATA.columns["label"][part])) == 2 for part in parts)
    assert info["rows_left_out"] == 0


def test_shards_may_be_sized_or_counted():
    sized, info = make_partition(
        DATA, name="shards", clients=4, seed=2, shard_size=30, shards_per_client=None
    )
    assert info["rows_left_out"] == 0
    both, info = make_partition(
        DATA, name="shards", clients=4, seed=2, shard_size=30, shards_per_client=2
    )
    assert [len(part) for part in both] == [60] * 4
    assert info["rows_left_out"] == 400 - 240
    assert sum(len(part) for part in sized) == 400


def test_natural_clients_are_the_values_in_sorted_order(capfd):
    parts, info = make_partition(DATA, name="natural", clients=None, seed=0, column="film")
    names = [set(DATA.columns["film"][part]) for part in parts]
    assert names == [{f"film {k}"} for k in range(9)]
    assert info["clients_asked"] == 9
    assert info["rows_left_out"] == 0
    same, _ = make_partition(DATA, name="natural", clients=9, seed=5, column="film")
    assert all(np.array_equal(a, b) for a, b in zip(parts, same, strict=True))
    assert capfd.readouterr() == ("", "")


def test_the_largest_natural_clients_are_kept_in_sorted_order():
    names, counts = np.unique(DATA.columns["film"], return_counts=True)
    large = np.sort(np.argsort(-counts, kind="stable")[:4])
    assert large.tolist() != [0, 1, 2, 3]
    parts, info = make_partition(DATA, name="natural", clients=4, seed=0, column="film", largest=4)
    assert [{*DATA.columns["film"][part]} for part in parts] == [{names[k]} for k in large]
    assert info["names"] == [names[k] for k in large]
    assert info["rows_left_out"] == counts.sum() - counts[large].sum()


def test_small_natural_clients_are_left_out():
    counts = np.unique(DATA.columns["film"], return_counts=True)[1]
    least = int(np.median(counts))
    parts, info = make_partition(
        DATA, name="natural", clients=None, seed=0, column="film", least=least
    )
    assert [len(part) for part in parts] == counts[counts >= least].tolist()
    assert info["names"] == [f"film {k}" for k in np.flatnonzero(counts >= least)]
    assert info["rows_left_out"] == counts[counts < least].sum() > 0


def test_fedslop_cuts_each_class_at_the_rounded_cumulative_shares():
    parts, _ = make_partition(DATA, name="fedslop", clients=4, seed=9, empty="drop", alpha=3.0)
    rng = generator(9, "partition")
    for label in range(5):
        rows = rng.permutation(np.flatnonzero(DATA.columns["label"] == label))
        cuts = [int(c * len(rows)) for c in np.cumsum(rng.dirichlet([3.0] * 4))[:-1]]
        for part, piece in zip(parts, np.split(rows, cuts), strict=True):
            assert set(part[DATA.columns["label"][part] == label]) == set(piece)


def test_empty_clients_are_dropped_on_request_and_refused_otherwise():
    kept, info = make_partition(DATA, name="fedslop", clients=60, seed=0, empty="drop", alpha=0.01)
    assert info["clients_dropped"] > 0
    assert info["clients_asked"] == 60 == len(kept) + info["clients_dropped"]
    with pytest.raises(ConfigError, match=r"of 60 clients without samples \(\d+, .*\.\.\.\)") as e:
        make_partition(DATA, name="fedslop", clients=60, seed=0, alpha=0.01)
    assert "partition.empty=drop" in str(e.value)
    assert "larger partition.alpha" in str(e.value)


BAD = {
    "name": ({"name": "dirichlett"}, "did you mean 'dirichlet'"),
    "empty": ({"name": "iid", "empty": "skip"}, "unknown partition.empty 'skip'.*drop, error"),
    "clients": ({"name": "iid", "clients": 0}, "clients=0"),
    "clients null": ({"name": "iid", "clients": None}, "clients is not set"),
    "clients many": (
        {"name": "dirichlet", "alpha": 1.0, "clients": 401},
        "clients=401.*400 samples",
    ),
    "alpha": ({"name": "dirichlet", "alpha": 0.0}, "partition.alpha=0.0: expected a positive"),
    "alpha word": ({"name": "fedslop", "alpha": "x"}, "partition.alpha='x': expected float"),
    "min_size": ({"name": "dirichlet", "alpha": 1.0, "min_size": -1}, "partition.min_size=-1"),
    "min_size high": (
        {"name": "dirichlet", "alpha": 0.1, "min_size": 79},
        "partition.alpha=0.1, partition.min_size=79",
    ),
    "classes": (
        {"name": "pathological", "classes_per_client": 6},
        "partition.classes_per_client=6",
    ),
    "no shards": (
        {"name": "shards", "shards_per_client": None},
        "partition.shards_per_client or partition.shard_size",
    ),
    "shard_size": ({"name": "shards", "shard_size": 0}, "partition.shard_size=0"),
    "shards many": ({"name": "shards", "shard_size": 300}, "partition.shard_size=300"),
    "column": ({"name": "natural", "column": "fim"}, "did you mean 'film'"),
    "natural clients": (
        {"name": "natural", "column": "film", "clients": 4},
        "clients=4, but partition.column=film has 9 values.*clients=null",
    ),
    "natural none": (
        {"name": "natural", "column": "film", "least": 401, "clients": None},
        "partition.least=401: none of the 9 values of film",
    ),
    "natural enough": (
        {"name": "natural", "column": "film", "least": 2, "clients": 4},
        "clients=4, but .* has 9 values, 9 with at least 2 samples",
    ),
    "largest": (
        {"name": "natural", "column": "film", "largest": 10, "clients": None},
        "partition.largest=10, but film has 9 values.*largest=9",
    ),
    "least": ({"name": "natural", "column": "film", "least": 0}, "partition.least=0"),
    "given": ({"name": "given"}, "has no division"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_the_key(change, words):
    with pytest.raises(ConfigError, match=words):
        make_partition(DATA, **{"clients": 5, "seed": 0} | change)


@pytest.mark.parametrize("name", [name for name in ARGS if name != "iid"])
def test_a_division_by_class_needs_classes(name):
    numbers = Samples(DATA.train.inputs, DATA.train.target.float())
    data = DataSet(**{**vars(DATA), "columns": {}, "loss": "squared_error", "train": numbers})
    with pytest.raises(ConfigError, match=r"no classes.*partition=iid"):
        make_partition(data, name=name, clients=3, seed=0, **ARGS[name])


def test_all_partitions_are_tested():
    assert set(PARTITIONS) == set(ARGS) | {"natural", "given", "bootstrap", "auto"}
