"""Old names of keys are errors that name the new one; a key means the same in all sources."""

from __future__ import annotations

import inspect
import re

import pytest

import fedraclora
from fedraclora.binding import bind
from fedraclora.data import DATASETS
from fedraclora.errors import ConfigError
from fedraclora.limits import Fraction
from fedraclora.renamed import RENAMED
from fedraclora.schema import hints

NEW = re.compile(r"\b[a-z]+\.[a-z_]+\b")


@pytest.mark.parametrize("key", RENAMED)
def test_an_old_key_is_an_error_that_names_the_new_one(key: str) -> None:
    group, _, leaf = key.partition(".")
    new = [name.partition(".")[2] for name in NEW.findall(RENAMED[key])]
    loader = next(n for n, row in DATASETS.items() if {*new} & {*inspect.signature(row).parameters})
    said = re.escape(new[0])
    with pytest.raises(ConfigError, match=said):
        bind(group, DATASETS, {"name": loader, leaf: None})
    with pytest.raises(ConfigError, match=said):
        fedraclora.simulate(f"data={loader}", f"{key}=null")


def test_a_key_means_the_same_in_every_source() -> None:
    kinds = {
        "test_fraction": {Fraction, Fraction | None},
        "test_file": {str | None},
        "test_function": {str | None},
        "split_seed": {int},
    }
    found = {key: [row for row in DATASETS.values() if key in hints(row)] for key in kinds}
    for key, rows in found.items():
        assert rows
        assert all(hints(row)[key] in kinds[key] for row in rows), key
    old = {key.partition(".")[2] for key in RENAMED if key.startswith("data.")}
    assert not [row for row in DATASETS.values() if old & {*hints(row)}]
