"""Makes `worlds` importable: test folders are no packages, and their files share this one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: these tests kill no process."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
