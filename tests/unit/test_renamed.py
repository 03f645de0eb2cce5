"""Old names of keys are errors that name the new one; a key means the same in all sources."""

from __future__ import annotations

import re

import pytest

import fedraclora
from fedraclora.data import DATASETS
from fedraclora.errors import ConfigError
from fedraclora.limits import Fraction
from fedraclora.renamed import KEYS, VALUES
from fedraclora.schema import hints

WORD = re.compile(r"[a-z_]+(?:\.[a-z_]+)?")
# What is chosen beside a key, so that it would be read if its name were the new one.
BESIDE = {"data.arguments": "data=function", "data.test": "data=digits"}


@pytest.mark.parametrize("key", KEYS)
def test_an_old_key_is_an_error_that_names_the_new_one(key: str) -> None:
    new = WORD.match(KEYS[key])
    assert new is not None
    beside = [BESIDE[key]] if key in BESIDE else []
    with pytest.raises(ConfigError, match=re.escape(new[0])):
        fedraclora.simulate(*beside, f"{key}=null")
    group, dot, leaf = key.partition(".")
    with pytest.raises(ConfigError, match=re.escape(new[0])):
        fedraclora.simulate(*beside, **{group: {leaf: None} if dot else None})


@pytest.mark.parametrize(("kind", "value"), [row for row in VALUES if row[0] != "command"])
def test_an_old_value_is_an_error_that_says_what_to_write(kind: str, value: str) -> None:
    beside = ["method=fedavg_lora"] if kind == "method.zero_init" else []
    with pytest.raises(ConfigError, match=re.escape(VALUES[kind, value][:30])):
        fedraclora.simulate(*beside, f"{kind}={value}")


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
    old = {key.partition(".")[2] for key in KEYS if key.startswith("data.")}
    assert not [row for row in DATASETS.values() if old & {*hints(row)}]
