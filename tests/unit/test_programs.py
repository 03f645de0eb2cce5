"""Programs end with all that they have started, however deaf that is."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from fedraclora.engines import programs
from fedraclora.engines.programs import Program, end_all

pytestmark = pytest.mark.long

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", {child!r}])
time.sleep(300)
"""
CHILD = """
import os, pathlib, signal, time
{deaf}
pathlib.Path({mark!r} + str(os.getpid())).touch()
time.sleep(300)
"""
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def started(folder: Path, monkeypatch: pytest.MonkeyPatch, deaf: str) -> tuple[Program, int]:
    """A program that has started another; the number of that one."""
    folder.mkdir()
    child, parent = folder / "child.py", folder / "parent.py"
    child.write_text(CHILD.format(deaf=deaf, mark=str(folder / "pid")))
    parent.write_text(PARENT.format(child=str(child)))
    monkeypatch.setattr(shutil, "which", lambda name, path: str(parent))
    program = Program("flower-supernode", [], dict(os.environ), folder / "log")
    end = time.monotonic() + 120
    while not (marks := [*folder.glob("pid*")]):
        assert time.monotonic() < end, program.last_words
        time.sleep(0.02)
    return program, int(marks[0].name.removeprefix("pid"))


def goes(pid: int) -> bool:
    """Whether a process that was ended goes: its files close, by which it is seen, just before."""
    end = time.monotonic() + 60
    while runs(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not runs(pid)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_what_a_program_has_started_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both = [started(tmp_path / name, monkeypatch, "") for name in ("one", "two")]
    assert all(runs(pid) for _, pid in both)
    end_all([program for program, _ in both])
    assert all(program.ended for program, _ in both)
    assert all(goes(pid) for _, pid in both)
    assert caplog.records == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_what_does_not_end_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program, pid = started(tmp_path / "one", monkeypatch, DEAF)
    monkeypatch.setattr(programs, "END", 0.5)
    with caplog.at_level(logging.WARNING):
        program.end()
    assert program.ended
    assert goes(pid)
    assert [record.getMessage() for record in caplog.records] == [
        "0.5 s after SIGTERM these programs still run: flower-supernode"
    ]


def test_a_program_that_has_ended_can_be_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "program.py"
    parent.write_text("")
    monkeypatch.setattr(shutil, "which", lambda name, path: str(parent))
    program = Program("flower-supernode", [], dict(os.environ), tmp_path / "log")
    program.process.wait(120)
    program.end()
    program.end()
    assert program.process.returncode == 0
