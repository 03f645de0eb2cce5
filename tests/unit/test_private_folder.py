"""Who else may read the files of a run: nobody, unless a key says so."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedraclora
from fedraclora.errors import CheckpointError
from fedraclora.run.folder import locked_folder
from fedraclora.weights.files import is_private, write_text
from tests.unit.test_measuring import moons, net

UMASKS = (0o022, 0o000)
WORDS = ("output.progress=false", "local.lr=0.1", "evaluate.clients=all", "evaluate.share=0.4")
WRITTEN = {
    *("config.yaml", "ledger.jsonl", "clients.parquet", "curves.png", ".lock", "summary.json"),
    *("digests.json", "checkpoint.safetensors"),
}


@pytest.fixture
def _umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def simulated(folder: Path, *words: str, rounds: int = 1, **given: Any) -> fedraclora.RunResult:
    settings: dict[str, Any] = {"clients_per_round": 3, "rounds": rounds, "folder": folder} | given
    return fedraclora.simulate(*WORDS, *words, model=net(), data=moons(), **settings)


def modes(folder: Path) -> dict[str, set[int]]:
    """The modes of the folders, and of the files, from the one of the run down."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    assert {path.name for path in files} >= WRITTEN
    parts = {"folders": folders, "files": files}
    return {name: {stat.S_IMODE(p.stat().st_mode) for p in part} for name, part in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("_umask", "made"), [(0o022, True), *((mask, False) for mask in UMASKS)], indirect=["_umask"]
)
def test_nobody_else_can_enter_a_run_folder_or_read_its_files(
    _umask: int, made: bool, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)  # as /home and /srv are
    folder = tmp_path / "runs" / "a"
    if made:
        folder.mkdir(parents=True)
    simulated(folder)
    run = simulated(folder, rounds=2, resume=True)
    run.export(folder / "export", "state_dict")
    assert modes(folder) == {"folders": {0o700}, "files": {0o600}}
    assert made or folder.parent.stat().st_mode & 0o777 == 0o777 & ~_umask


@pytest.mark.parametrize("_umask", [*UMASKS, 0o007], indirect=True)
def test_a_key_opens_a_folder_as_far_as_the_umask_does(_umask: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    simulated(tmp_path / "a", "output.shared=true")
    lock = tmp_path / "a" / ".lock"
    writable = ~_umask & 0o022
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600 | writable | writable << 1
    lock.chmod(0o666 & ~_umask)
    assert modes(tmp_path / "a") == {"folders": {0o777 & ~_umask}, "files": {0o666 & ~_umask}}


@pytest.mark.slow
@pytest.mark.parametrize("_umask", [0o022], indirect=True)
def test_a_run_that_goes_on_leaves_its_folder_as_open_as_it_was(
    _umask: int, tmp_path: Path
) -> None:
    """But for the lock, which readers could hold."""
    tmp_path.chmod(0o755)
    simulated(tmp_path / "a", "output.shared=true")
    (tmp_path / "a" / ".lock").chmod(0o644)
    simulated(tmp_path / "a", "output.shared=true", rounds=2, resume=True)
    assert stat.S_IMODE((tmp_path / "a" / ".lock").stat().st_mode) == 0o600
    assert not is_private(tmp_path / "a")


@pytest.mark.parametrize("_umask", [0o022], indirect=True)
def test_what_is_saved_of_a_run_is_private(_umask: int, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    run = fedraclora.simulate(
        "local.lr=0.1", model=net(), data=moons(), clients_per_round=3, rounds=1
    )
    place = run.save(tmp_path / "saved")
    assert is_private(place)
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user for a while")
@pytest.mark.parametrize("shared", [False, True])
def test_another_user_can_neither_read_nor_hold_a_run(shared: bool, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for path in (tmp_path, *tmp_path.parents):
            path.chmod(path.stat().st_mode | 0o005)
        with locked_folder(tmp_path / "a", shared=shared):
            write_text(tmp_path / "a" / "config.yaml", "data: mine")
        child = os.fork()
        if not child:
            os._exit(tried(tmp_path / "a", shared))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        os.umask(before)


def tried(folder: Path, shared: bool) -> int:
    """What another user gets at: 0 if that is as it should be."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        read = (folder / "config.yaml").read_text() == "data: mine"
    except PermissionError:
        read = False
    try:
        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except PermissionError:
        held = False
    return int(held) + 2 * int(read != shared)


def test_a_lock_that_is_another_users_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fedraclora.run.folder.open_lock", refuse)
    with pytest.raises(CheckpointError, match=r"another user"), locked_folder(tmp_path / "a"):
        pass


def test_the_command_that_opens_a_run_leaves_its_lock_closed(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    line = next(line for line in page.splitlines() if "chmod g+rX" in line)
    folder = tmp_path / "runs" / "first"
    simulated(folder)
    (folder / "tune.lock").touch(0o600)
    subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, check=True)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")}
    locks = {name: found.pop(name) for name in (".lock", "tune.lock")}
    assert not any(mode & 0o077 for mode in locks.values())
    assert all(mode & 0o040 for mode in found.values())
    assert found["chain"] & 0o010
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
