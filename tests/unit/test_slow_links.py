"""What was measured on slow links is found again, and targets are met between evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedraclora.errors import ConfigError
from fedraclora.experiments import slow_links


def test_the_target_is_met_on_the_line_between_two_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [(0, 0.1), (4, 0.7), (8, 0.9), (12, 0.75)]
    curve = [{"round": x, "metrics": {"pearson": y}} for x, y in points]
    chosen = {"phase": "final", "row": "a", "value": 0.5}
    runs = [{**chosen, "curve": curve}, {**chosen, "curve": curve[:2]}]
    monkeypatch.setattr(slow_links, "STUDY", tmp_path)
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps(runs[0]) + "\n")
    assert slow_links.rounds_to_target("a") == [pytest.approx(6.0)]
    file.write_text(json.dumps(runs[1]) + "\n")
    with pytest.raises(ConfigError, match=r"a: .*pearson 0.8"):
        slow_links.rounds_to_target("a")


def test_what_was_measured_is_found_again(tmp_path: Path) -> None:
    record = slow_links.Record(tmp_path)
    for seconds in ([3.0, 1.0, 2.0], [1.0, 7.0, 9.0, 8.0]):  # the last one counts
        row = {"kind": "bed", "row": "fedavg", "rate": 10, "seconds": seconds}
        record.add(row)
    assert record.median("fedavg", 10) == 8.0
    assert record.find("bed", "fedavg", 100) is None
