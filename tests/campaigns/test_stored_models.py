"""A short form of the campaign of stored models; see `tests.campaigns.stored_models`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.stored_models import campaign


@pytest.mark.slow
@pytest.mark.parametrize(
    "every", [47, pytest.param(3, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_a_damaged_model_is_named_or_the_whole_one(every: int, tmp_path: Path) -> None:
    report = campaign(every, tmp_path)
    assert report.counts["named"] > 40, report.counts
    assert not report.wrong, "\n".join(report.wrong)
