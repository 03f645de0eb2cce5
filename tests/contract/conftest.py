"""Makes `worlds` importable: test folders are no packages, and their files share this one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk: these tests kill no process."""
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(autouse=True, scope="module")
def coefficients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Send coefficients of factors whose sides are so short that they themselves would be sent."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_derived":
            patch.setattr("fedraclora.strategies.shared.past.smaller", lambda *_: True)
        yield
