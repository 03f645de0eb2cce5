"""A short form of the campaign of odd adapters; see `tests.campaigns.adapters`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


@pytest.mark.slow
@pytest.mark.parametrize(
    "every", [23, pytest.param(1, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_an_odd_adapter_is_named_or_merged_as_peft_does(every: int, tmp_path: Path) -> None:
    from tests.campaigns.adapters import campaign  # which imports PEFT

    report = campaign(every, tmp_path / "adapter")
    assert report.counts["named"] > 30, report.counts
    assert not report.wrong, "\n".join(report.wrong)
