"""The kept tables are those of the runs that are kept beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedraclora.commands import RESULTS
from fedraclora.experiments.records import MAKERS

TABLES = (".md", ".csv")


def tables(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.iterdir() if path.suffix in TABLES)
    return {path.name: path.read_bytes() for path in found if path.name != "README.md"}


@pytest.mark.parametrize("name", MAKERS)
def test_tables_follow_from_their_runs(name: str, tmp_path: Path) -> None:
    MAKERS[name](RESULTS / name, tmp_path)
    assert tables(tmp_path) == tables(RESULTS / name)
