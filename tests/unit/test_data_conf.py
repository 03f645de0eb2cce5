"""Every YAML of data, partition and model has the keys of what it configures."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from fedraclora.data import DATASETS, PARTITIONS
from fedraclora.models import MODELS

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = {
    "data": (DATASETS, {"labels", "validation"}, set()),
    "partition": (PARTITIONS, {"empty"}, {"data", "clients", "seed"}),
    "model": (MODELS, set(), {"shape", "classes", "seed"}),
}
FILES = [(group, file) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


def group_of(file):
    """Give the keys of the group, also of a file that says more than these."""
    keys = yaml.safe_load(file.read_text())
    return keys.get(file.parent.name, keys)


@pytest.mark.parametrize(("group", "file"), FILES, ids=[f"{g}/{f.stem}" for g, f in FILES])
def test_keys_are_the_arguments(group, file):
    table, common, passed = GROUPS[group]
    keys = group_of(file)
    name = keys.pop("name")
    if name == "own":
        passed = {"client", "alone"}  # each node says which it is
    wanted = set(inspect.signature(table[name]).parameters) - passed
    assert set(keys) == wanted | common


@pytest.mark.parametrize(("group", "file"), FILES, ids=[f"{g}/{f.stem}" for g, f in FILES])
def test_the_first_line_says_what_it_is(group, file):
    first = next(line for line in file.read_text().splitlines() if "@package" not in line)
    assert first.startswith("# ")
    assert len(first) > 10


@pytest.mark.parametrize("group", GROUPS)
def test_every_name_has_a_file(group):
    names = {group_of(file)["name"] for g, file in FILES if g == group}
    assert names == set(GROUPS[group][0])
