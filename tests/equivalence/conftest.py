"""Lets the tests of this folder share their cases, for test folders are no packages; and a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pretend import Card, pretend_card

# Where tests of several modules assert: a failure shows the values.
pytest.register_assert_rewrite("vectorised_agreement")


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A GPU: one that is not there, and in tests marked ``gpu`` the real one."""
    if request.param == "real":
        yield Card(None)
        return
    with pretend_card(monkeypatch) as pretended:
        yield Card(pretended)
