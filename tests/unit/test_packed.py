"""Files that grow as plain text and are kept packed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedraclora.errors import DataError
from fedraclora.run import packed

TEXT = '{"key": "\u00e4"}\n' * 300


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "runs.jsonl"
    path.write_text(TEXT, encoding="utf-8")
    packed.compress(path)
    return path


def test_a_packed_file_is_read_by_its_plain_name(file: Path) -> None:
    assert [path.name for path in file.parent.iterdir()] == ["runs.jsonl.xz"]
    assert packed.exists(file)
    assert packed.read_text(file) == TEXT
    assert (file.parent / "runs.jsonl.xz").stat().st_size < len(TEXT) / 10


def test_an_unpacked_file_takes_the_place_of_the_packed_one(file: Path) -> None:
    packed.decompress(file)
    assert [path.name for path in file.parent.iterdir()] == ["runs.jsonl"]
    assert file.read_text(encoding="utf-8") == TEXT
    packed.decompress(file)  # already is
    assert packed.read_text(file) == TEXT


def test_the_plain_file_counts_where_a_kill_left_both(file: Path) -> None:
    file.write_text("newer", encoding="utf-8")
    assert packed.read_text(file) == "newer"
    packed.decompress(file)
    assert [path.name for path in file.parent.iterdir()] == ["runs.jsonl"]
    assert packed.read_text(file) == "newer"


def test_a_missing_file_is_neither(tmp_path: Path) -> None:
    packed.decompress(tmp_path / "a")
    packed.compress(tmp_path / "a")
    assert not packed.exists(tmp_path / "a")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("cut", [0, 9, -20])
def test_a_damaged_file_is_named(file: Path, cut: int) -> None:
    there = packed.packed(file)
    there.write_bytes(there.read_bytes()[:cut])
    for read in (packed.read_text, packed.decompress):
        with pytest.raises(DataError, match=r"runs\.jsonl\.xz is damaged .*copy"):
            read(file)
    assert not file.exists()
