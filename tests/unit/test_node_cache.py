"""A node's cache: it removes what it has made, and nothing that lies beside it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from fedraclora.clients import cache
from fedraclora.clients.cache import CACHE, MARKER, RUNS, folder_of, make_room
from fedraclora.clients.node import introduce
from fedraclora.errors import ClientError, ConfigError, WireError
from tests.strangers import NOBODY, needs_root


def node(folder: Path) -> Context:
    return Context(1, 2, {"partition-id": 3, "cache": str(folder)}, RecordDict(), {})


def run_once(home: Path, run: str) -> Path:
    """What a node does when it is asked by a run: makes room and writes weights."""
    folder = folder_of(node(home), run, 3)
    make_room(folder.parent)
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    return folder.parent


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_what_else_lies_in_the_folder_of_a_cache_is_left_alone(tmp_path: Path) -> None:
    """The attack: a cache is a folder with others' folders in it, older than any run."""
    home = tmp_path / "home"
    for i in range(7):
        (home / f"patients{i}" / "3").mkdir(parents=True)
        (home / f"patients{i}" / "3" / "weights.safetensors").write_text(f"records {i}")
        os.utime(home / f"patients{i}", (1000 + i, 1000 + i))
    (home / "notes.txt").write_text("mine")
    before = snapshot(home)
    for i in range(9):
        run_once(home, f"run{i}")
        run_once(home, "patients0")  # a run may have the name of somebody's folder
    after = snapshot(home)
    assert {n: t for n, t in after.items() if not n.startswith(CACHE)} == before
    made = {p.name for p in (home / CACHE).iterdir()} - {MARKER}
    assert made == {"patients0", *(f"run{i}" for i in range(9)[1 - RUNS :])}


@pytest.mark.parametrize("depth", ["cache", "run"])
def test_a_folder_of_that_name_that_somebody_else_has_filled_is_an_error(
    depth: str, tmp_path: Path
) -> None:
    foreign = tmp_path / CACHE
    if depth == "run":
        run_once(tmp_path, "other")
        foreign = tmp_path / CACHE / "mine"
    (foreign / "3").mkdir(parents=True)
    (foreign / "3" / "weights.safetensors").write_text("no tensors")
    before = snapshot(foreign)
    with pytest.raises(ConfigError, match=r"fedraclora did not make it"):
        run_once(tmp_path, "mine")
    introduce(node(tmp_path), "mine")  # which removes weights of its own that are damaged
    assert snapshot(foreign) == before


def test_folders_without_the_marker_and_links_are_never_removed(tmp_path: Path) -> None:
    aside = run_once(tmp_path / "aside", "old")
    run_once(tmp_path, "first")
    (tmp_path / CACHE / "by hand").mkdir()
    (tmp_path / CACHE / "by hand" / "a").write_text("mine")
    (tmp_path / CACHE / "link").symlink_to(aside)
    for i in range(RUNS + 2):
        run_once(tmp_path, f"run{i}")
    there = {p.name for p in (tmp_path / CACHE).iterdir()}
    assert {"by hand", "link"} < there
    assert "first" not in there
    assert (aside / "3" / "weights.safetensors").is_file()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    """Where a process died between making it and marking it."""
    (tmp_path / CACHE).mkdir()
    assert (run_once(tmp_path, "first").parent / MARKER).is_file()
    (tmp_path / CACHE / "second").mkdir()
    assert (run_once(tmp_path, "second") / MARKER).is_file()


def test_nobody_else_may_change_what_leads_to_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to a folder of its path may put another cache there."""
    home = tmp_path / "home"
    run_once(home / "cache", "first")
    monkeypatch.setattr(cache, "_alone_in", lambda _: False)
    for part in (home, home / "cache", home / "cache" / CACHE, home / "cache" / CACHE / "first"):
        mode = part.stat().st_mode
        for bad in (0o777, 0o775):
            part.chmod(bad)
            with pytest.raises(ConfigError, match=rf"^{part}, .* has mode {bad:o}"):
                run_once(home / "cache", "first")
        part.chmod(mode)
    home.chmod(0o1777)  # as the folder for temporary files: nobody moves what is another's
    run_once(home / "cache", "first")
    home.chmod(0o775)
    monkeypatch.setattr(cache, "_alone_in", lambda _: True)  # the group of this user alone
    run_once(home / "cache", "first")
    home.chmod(0o777)
    (tmp_path / "link").symlink_to(home / "cache")
    with pytest.raises(ConfigError, match=rf"^{home}, "):
        run_once(tmp_path / "link", "first")
    home.chmod(0o755)
    run_once(tmp_path / "link", "first")


@needs_root
def test_nobody_else_owns_what_leads_to_a_cache(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run_once(home / "cache", "first")
    os.chown(home, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=rf"^{home}, .* belongs to user {NOBODY}"):
        run_once(home / "cache", "first")


@pytest.mark.parametrize("value", [5, "", "a\0b", "~nobody-of-this-name/x"])
def test_a_cache_that_is_no_path_is_refused(value: str | int) -> None:
    config: dict[str, str | int] = {"partition-id": 3, "cache": value}
    with pytest.raises(ConfigError, match="node-config cache="):
        folder_of(Context(1, 2, config, RecordDict(), {}), "run", 3)


def test_a_cache_that_cannot_be_made_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClientError, match=rf"{tmp_path}/file.*Not a directory.*set cache in"):
        run_once(tmp_path / "file" / "cache", "first")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(ClientError, match=r"No space left .* make room"):
        run_once(tmp_path, "first")


@pytest.mark.parametrize("run", ["", "..", "a/b", "/etc", "run 1", "x\n", "\u0662"])
def test_a_run_is_called_by_letters_and_digits(run: str, tmp_path: Path) -> None:
    with pytest.raises(WireError, match="letters and digits only"):
        folder_of(node(tmp_path), run, 3)
