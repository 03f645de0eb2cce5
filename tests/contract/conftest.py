"""Makes `worlds` importable, and has a failing test say which law it holds, and what to set."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from laws import add_law
from worlds import World, make_world


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Put the law beside the assertion that it broke."""
    report = yield
    add_law(report, call, getattr(item, "originalname", ""))
    return report


@pytest.fixture(scope="module")
def world() -> World:
    """Five ragged clients (one has a single sample), averaged head and biases."""
    return make_world()


@pytest.fixture(autouse=True, scope="module")
def coefficients(request: pytest.FixtureRequest) -> Iterator[None]:
    """Send coefficients of factors whose sides are so short that they themselves would be sent."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in {"test_subspace_rac_lora_rounds", "test_rounded_links"}:
            patch.setattr("fedraclora.strategies.shared.past.smaller", lambda *_: True)
        yield
