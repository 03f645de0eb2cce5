"""Samples that are trained on and measured on, too: counted from one, refused from a tenth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedraclora
from fedraclora.data.duplicates import RowSubset, check_duplicates, shared_rows
from fedraclora.data.encoders.chat import Encoded, packed, padded
from fedraclora.data.samples import Samples
from fedraclora.errors import DataError
from fedraclora.rng import generator
from tests.common import normal

QUIET = ("output.progress=false", "pretrain=none", "rounds=0")
TRAIN, TEST = 60, 40


def rows(count: int, key: object) -> Samples:
    x = normal(count, 3, key=key).float()
    return Samples({"x": x}, (x[:, 0] > 0).long())


def with_copies(copies: int) -> tuple[Samples, Samples]:
    """Training rows, and test rows of which some are training rows, in another order."""
    train, test = rows(TRAIN, "train"), rows(TEST, "test")
    order = torch.from_numpy(generator(0, "order").permutation(TEST))
    own = Samples.join([train.take(torch.arange(copies)), test.take(torch.arange(TEST - copies))])
    return train, own.take(order)


def checked(train: list[Samples], test: Samples, *, keep: bool = False) -> dict[str, str]:
    tables = [RowSubset(samples) for samples in train]
    return check_duplicates(tables, {"test samples": [RowSubset(test)]}, "data.file=x", keep=keep)


@pytest.mark.parametrize("copies", [0, 1, 3, 4, 39, 40])
def test_a_tenth_of_the_test_samples_may_not_be_training_samples(copies: int) -> None:
    train, test = with_copies(copies)
    assert int(shared_rows([RowSubset(train)], [RowSubset(test)]).sum()) == copies
    if copies >= TEST / 10:
        with pytest.raises(
            DataError, match=rf"{copies} of the 40 .*60 .*data.file=x.*data.duplicates=keep"
        ):
            checked([train], test)
    told = checked([train], test, keep=copies >= TEST / 10)
    assert [f"{copies} of the 40" in text for text in told.values()] == [True] * (copies > 0)
    other = Samples(test.inputs, 1 - test.target)  # under another label they are none
    assert not checked([train], other)


def write(folder: Path, source: str, train: Samples, test: Samples) -> dict[str, Any]:
    """Write samples as a loader reads them."""
    (x, y), (test_x, test_y) = ((s.inputs["x"].numpy(), s.target.numpy()) for s in (train, test))
    mlp = {"model": "mlp"}
    if source == "arrays":
        np.savez(folder / "a.npz", x=x, target=y, x_test=test_x, target_test=test_y)
        return mlp | {"data": {"name": "arrays", "file": str(folder / "a.npz")}, "clients": 3}
    if source == "own":
        for client in range(3):
            np.savez(folder / f"{client}.npz", x=x[client::3], target=y[client::3])
        np.savez(folder / "test.npz", x=test_x, target=test_y)
        own = {"name": "own", "samples": str(folder), "test_file": str(folder / "test.npz")}
        return mlp | {"data": own, "clients": 3}
    if source == "objects":
        data = [(x[client::3], y[client::3]) for client in range(3)]
        return {"data": data, "test": (test_x, test_y), "model": torch.nn.Linear(3, 2)}
    frame, held = (
        pd.DataFrame(a, columns=["p", "q", "r"]).assign(label=np.where(b, "yes", "no"))
        for a, b in ((x, y), (test_x, test_y))
    )
    if source == "frame":
        return mlp | {"data": frame, "test": held, "clients": 3, "target": "label"}
    frame.to_csv(folder / "train.csv", index=False)
    held.to_csv(folder / "test.csv", index=False)
    table = {"name": "table", "file": str(folder / "train.csv"), "label": "label"}
    return mlp | {"data": table | {"test_file": str(folder / "test.csv")}, "clients": 3}


@pytest.mark.parametrize("source", ["arrays", "own", "objects", "frame", "table"])
def test_every_loader_counts_and_refuses(source: str, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    run = fedraclora.simulate(*QUIET, **write(tmp_path / "few", source, *with_copies(2)))
    assert "2 of the 40 test samples" in run.summary["task"]["duplicates"]["test samples"]
    given = write(tmp_path, source, *with_copies(39))
    with pytest.raises(DataError, match=r"39 of the 40 test.*data.duplicates=keep") as error:
        fedraclora.simulate(*QUIET, **given)
    assert "(data.test_file)" not in str(error.value)  # which a fold refuses
    kept = fedraclora.simulate(*QUIET, "data.duplicates=keep", **given)
    assert "39 of the 40" in kept.summary["task"]["duplicates"]["test samples"]
    clean = fedraclora.simulate(*QUIET, **write(tmp_path, source, *with_copies(0)))
    assert "duplicates" not in clean.summary["task"]


def test_rows_that_occur_twice_in_one_table_are_found_across_its_parts_and_its_clients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = rows(90, "one table")
    twice = Samples.join([whole, whole])
    x, y = twice.inputs["x"], twice.target
    given: dict[str, Any] = {"model": torch.nn.Linear(3, 2), "data": (x, y), "clients": 3}
    with pytest.raises(DataError, match="test samples"):
        fedraclora.simulate(*QUIET, **given)
    with pytest.raises(DataError, match="validation samples"):
        fedraclora.simulate(*QUIET, "data.validation=0.3", **given, test=0)
    with pytest.raises(DataError, match="clients are evaluated on"):
        fedraclora.simulate(*QUIET, "evaluate.clients=all", **given, test=0)
    apart = [(x[:90], y[:90]), (x[90:], y[90:])]  # two clients with the same rows
    same = given | {"data": apart, "clients": None, "test": 0}
    with pytest.raises(DataError, match="clients are evaluated on"):
        fedraclora.simulate(*QUIET, "evaluate.clients=all", **same)
    caplog.set_level("INFO")
    words = ("evaluate.clients=all", "data.duplicates=keep")
    fedraclora.simulate(*QUIET, *words, **same)
    assert "of the 36 samples that clients are evaluated on are among the" in caplog.text
    few = Samples.join([whole, whole.take(torch.arange(3))])
    given |= {"data": (few.inputs["x"], few.target), "test": 0}
    run = fedraclora.simulate(*QUIET, "evaluate.clients=all", "evaluate.share=0.5", **given)
    assert "duplicates" in run.summary["task"] or run.rows[0]["clients"]["samples"]


def test_rows_of_few_values_repeat_by_chance_and_are_counted_alone() -> None:
    rng = generator(1, "few values")
    for chance, wide in ((0.5, 3), (0.03, 20)):
        x = torch.from_numpy((rng.random((400, wide)) < chance).astype(np.float32))
        y = (x[:, 0] > 0).long()
        train, test = (Samples({"x": x[part]}, y[part]) for part in (slice(300), slice(300, 400)))
        assert "of the 100" in checked([train], test)["test samples"]
        parts = [train.take(rows) for rows in torch.arange(300).split(100)]
        copy = train.take(torch.from_numpy(rng.permutation(300)))
        with pytest.raises(DataError, match=r"300 of the 300"):
            checked(parts, copy)
    some = rows(30, "often").take(torch.from_numpy(rng.integers(0, 30, 400)))
    train, test = some.take(torch.arange(300)), some.take(torch.arange(300, 400))
    assert "100 of the 100" in checked([train], test)["test samples"]
    rare = torch.from_numpy((rng.random((400, 20)) < 0.3).astype(np.float32))  # mostly different
    train = Samples({"x": rare[:300]}, torch.zeros(300).long())
    with pytest.raises(DataError, match=r"100 of the 100"):
        checked([train], train.take(torch.arange(100)))


def test_the_same_memory_is_refused_and_views_without_a_row_in_common_are_not() -> None:
    whole = rows(40, "memory")
    with pytest.raises(DataError, match="training samples themselves"):
        checked([whole], whole)
    with pytest.raises(DataError, match="training samples themselves"):
        checked([whole], whole.mapped(lambda tensor: tensor[5:20]))
    checked([whole.mapped(lambda t: t[::2])], whole.mapped(lambda t: t[1::2]))
    checked([], whole)
    empty = whole.take(torch.arange(0))
    assert not checked([whole], empty)
    assert not checked([empty], whole)


def conversations(count: int, key: str) -> list[Encoded]:
    """Prompts with answers, of several lengths, and a token behind that has no target."""
    rng, found = generator(2, "conversations", key), []
    for _ in range(count):
        size = int(rng.integers(3, 9))
        ids = rng.integers(3, 90, size + 4).tolist()
        found.append(Encoded([*ids, 1], [-100] * size + ids[size:] + [-100]))
    return found


def test_conversations_are_compared_whatever_they_are_padded_to_and_packed_with() -> None:
    train, other = conversations(50, "train"), conversations(30, "test")
    longest = [Encoded([5] * 40, [-100] * 5 + [5] * 35)]
    test = padded([*train[7:12], *other, *longest], 0)
    assert test.padded > padded(train, 0).padded
    for table in (padded(train, 0), packed(train, [None] * 50, 64, 0)[0]):
        shared = shared_rows([RowSubset(table)], [RowSubset(test)])
        assert shared.tolist() == [True] * 5 + [False] * 31
    with pytest.raises(DataError, match=r"5 of the 36"):
        checked([table], test)
    answered = [Encoded(one.ids, [*one.labels[:-3], 2, 2, -100]) for one in train[7:12]]
    assert not shared_rows([RowSubset(table)], [RowSubset(padded(answered, 0))]).any()


def test_texts_are_compared_whatever_they_are_padded_to() -> None:
    ids = torch.from_numpy(generator(3, "texts").integers(1, 99, (60, 12)))
    mask = (torch.arange(12) < torch.arange(60)[:, None] % 9 + 3).long()

    def table(part: slice, pad: int) -> Samples:
        ids_, mask_ = (torch.nn.functional.pad(t[part], (0, pad)) for t in (ids * mask, mask))
        return Samples({"input_ids": ids_, "attention_mask": mask_}, torch.zeros(len(ids_)).long())

    shared = shared_rows([RowSubset(table(slice(40), 0))], [RowSubset(table(slice(35, 60), 8))])
    assert shared.tolist() == [True] * 5 + [False] * 20
    with pytest.raises(DataError, match=r"5 of the 25"):
        checked([table(slice(40), 0)], table(slice(35, 60), 8))


def test_the_default_data_have_no_duplicates() -> None:
    run = fedraclora.simulate(*QUIET, "clients=20")
    assert "duplicates" not in run.summary["task"]
    lent = fedraclora.simulate(*QUIET, **write(Path(), "objects", *with_copies(0)))
    for config in (run.config, lent.config):
        assert config["data"]["duplicates"] == "error"
