"""Every YAML of data, partition and model has the keys of what it configures."""

from __future__ import annotations

import inspect

import pytest

from fedraclora.compose.choices import choice, groups
from fedraclora.data import DATASETS, PARTITIONS
from fedraclora.models import MODELS

GROUPS = {
    "data": (DATASETS, {"labels", "validation", "loss", "metrics", "duplicates"}, set()),
    "partition": (PARTITIONS, {"empty"}, {"data", "clients", "seed"}),
    "model": (MODELS, set(), {"shape", "classes", "seed"}),
}
CHOICES = [(group, name) for group in GROUPS for name in groups()[group]]


def group_of(group, name):
    """Give the keys of the group, also of a file that says more than these."""
    keys = choice(group, name)
    return keys.get(group, keys)


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=[f"{g}/{n}" for g, n in CHOICES])
def test_keys_are_the_arguments(group, name):
    table, common, passed = GROUPS[group]
    keys = group_of(group, name)
    kind = keys.pop("name")
    if kind == "own":
        passed = {"served"}  # each node says whose it has
    wanted = set(inspect.signature(table[kind]).parameters) - passed
    assert set(keys) == wanted | common


@pytest.mark.parametrize("group", GROUPS)
def test_every_name_has_a_file(group):
    names = {group_of(g, name)["name"] for g, name in CHOICES if g == group}
    assert names == set(GROUPS[group][0]) - {"object"}  # an object of a program has no file
