"""A short form of the campaign of damage; see `tests.campaigns.damage`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.damage import KINDS, campaign


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=[] if k in {"carried", "private"} else [pytest.mark.long])
        for k in KINDS
    ],
)
def test_damage_is_named_or_does_no_harm(kind: str, tmp_path: Path) -> None:
    report = campaign(1, 5, tmp_path, [kind])
    assert report.counts["named"] > 5, report.counts
    assert not report.wrong, "\n".join(report.wrong)
