"""Lets the tests of this folder share their cases, for test folders are no packages; and a GPU."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pretend import Card, pretend_card

# Where tests of several modules assert: a failure shows the values.
pytest.register_assert_rewrite("vectorized_agreement")


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """A GPU: one that is not there, and in tests marked ``gpu`` the real one."""
    if request.param == "real":
        yield Card(None)
        return
    with pretend_card(monkeypatch) as pretended:
        yield Card(pretended)


@pytest.fixture
def flower_is_heard(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """Flower's logger reaches caplog, whatever other tests have made of it."""
    logger = logging.getLogger("flwr")
    for name, value in (("disabled", False), ("propagate", True), ("filters", [])):
        monkeypatch.setattr(logger, name, value)
    monkeypatch.setattr(logger.manager, "disable", logging.NOTSET)
    # The level by its setter: loggers cache what they let through, and it clears that.
    caplog.set_level(logging.INFO, logger.name)
    return caplog
