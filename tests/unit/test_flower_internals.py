"""What is used of Flower beyond its public modules stands in one file, and does what it says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

import fedraclora
from fedraclora import flower_internals as internals

PUBLIC = ("app", "clientapp", "serverapp", "simulation")
HOMES = {"flower_internals.py", "flower_patches.py"}
ROOM = Path(fedraclora.__file__).parent
RECORDS = {"a": ConfigRecord({"x": 1}), "b": ArrayRecord({"w": Array(np.arange(6.0))})}


def private_names(source: str) -> Iterator[str]:
    """List the modules of Flower that a source imports and that are not public."""
    for node in ast.walk(ast.parse(source)):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            found = [str(node.module)]
        for name in found:
            first, _, rest = name.partition(".")
            if first == "flwr" and rest.partition(".")[0] not in PUBLIC:
                yield name


@pytest.mark.slow
def test_private_modules_of_flower_are_imported_in_one_place() -> None:
    assert [*private_names("from flwr.common import x\nimport flwr.app")] == ["flwr.common"]
    folders = [ROOM, *(ROOM.parent / name for name in ("strategies", "clients"))]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    files = [path for path in files if path.name not in HOMES and "experiments" not in path.parts]
    assert len(files) > 200
    assert [(path, name) for path in files for name in private_names(path.read_text())] == []


def test_records_are_read_as_they_were_written() -> None:
    records = RecordDict({**RECORDS})
    found = internals.records_from_bytes(internals.records_to_bytes(records))
    assert found.keys() == records.keys()
    assert found["a"] == RECORDS["a"]
    np.testing.assert_array_equal(found.array_records["b"]["w"].numpy(), np.arange(6.0))


def test_enough_shares_give_the_secret_back() -> None:
    secret = bytes(range(48))
    shares = internals.create_shares(secret, 2, 3)
    assert internals.join_shares(shares[1:]) == secret
    refused = 0
    for point in range(9, 17):  # what comes of wrong shares has by chance, seldom, the right form
        try:
            found = internals.join_shares([shares[0], bytes([point]) + shares[1][1:]])
        except ValueError as error:
            refused += "shares" in str(error)
        else:
            assert found != secret
    assert refused


def test_the_arguments_of_a_node_are_parsed_as_flower_does() -> None:
    parsed = internals.node_arguments(["--insecure", "--superlink", "host:1"])
    assert (parsed.insecure, parsed.superlink) == (True, "host:1")
    assert internals.node_config('data="a.npz" n=3') == {"data": "a.npz", "n": 3}
    assert internals.node_config(None) == {}


def test_what_no_superlink_wrote_says_nothing_of_a_key() -> None:
    assert internals.key_state("<html>") is None
