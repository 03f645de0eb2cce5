"""A folder for temporary files goes with its process, however that ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedraclora.engines.private_ray import RayFolder
from fedraclora.private_folder import MARKER, PREFIX, PrivateFolder

HOLDER = """
import sys, time
from fedraclora.private_folder import PrivateFolder
made = PrivateFolder(sys.argv[1])
(made.path / "key").write_text("secret")
print(made.name, flush=True)
time.sleep(300)
"""


def left(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGHUP])
def test_what_a_killed_process_left_is_removed_by_the_next(sign: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        assert stat.S_IMODE(held.stat().st_mode) == 0o700
        with PrivateFolder(str(tmp_path)) as other:
            assert left(tmp_path) == {held.name, Path(other).name}  # it is in use
        process.send_signal(sign)
        process.wait()
        assert (held / "key").read_text() == "secret"
        with PrivateFolder(str(tmp_path)) as other:
            assert left(tmp_path) == {Path(other).name}
    assert left(tmp_path) == set()


def test_what_others_made_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the marker, by another user, or elsewhere."""
    (tmp_path / f"{PREFIX}unmarked").mkdir()
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere, tmp_path / "other"):
        folder.mkdir()
        (folder / MARKER).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    (tmp_path / f"{PREFIX}file").touch()
    mine, before = os.geteuid(), left(tmp_path)
    with PrivateFolder(str(tmp_path)):
        pass
    assert left(tmp_path) == before
    (tmp_path / "other").rename(tmp_path / f"{PREFIX}other")
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    PrivateFolder(str(tmp_path)).cleanup()
    assert (tmp_path / f"{PREFIX}other").is_dir()
    monkeypatch.setattr(os, "geteuid", lambda: mine)
    PrivateFolder(str(tmp_path)).cleanup()
    assert left(tmp_path) == before - {"other"}


def test_all_that_a_run_makes_there_is_of_this_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("fedraclora.private_folder.SHORT", str(tmp_path))
    ray = RayFolder()
    assert (ray.path / MARKER).is_file()
    assert left(tmp_path) == {ray.path.name}
    ray.close()
    assert left(tmp_path) == set()
