"""Progress: one plain line a round off a terminal, and a bar that keeps its estimate on one."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from rich.console import Console  # noqa: TID251  a terminal of the test

from fedraclora.run.ledger import Row
from fedraclora.terminal import progress
from fedraclora.terminal.progress import RunProgress, fitted


def row(
    round_: int, accuracy: float | None = 0.5, seconds: float = 2.0, name: str = "accuracy"
) -> Row:
    return {
        "round": round_,
        "metrics": {} if round_ % 2 else {name: accuracy, "loss": 1.0},
        "train_loss": 0.25,
        "uplink_total": 1_500_000 * round_,
        "downlink_total": 3_000_000_000 * round_,
        "seconds": {"train": seconds},
    }


def test_off_a_terminal_each_round_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(100, shown=True, label="fedavg") as bar:
        bar.say("chunk: 3 clients")
        bar.row({"round": 0, "metrics": {"accuracy": 0.1}, "uplink_total": 0, "downlink_total": 0})
        bar.row(row(1))
        bar.row(row(2, None, name="f1"))
        bar.row(row(100))
    out, lines = capsys.readouterr()
    assert out == ""
    assert lines.splitlines() == [
        "chunk: 3 clients",
        "round 0 of 100: accuracy 0.1000, up 0.0 kB, down 0.0 kB",
        "round 1 of 100: training loss 0.2500, up 1.50 MB, down 3.00 GB, 3 min left",
        "round 2 of 100: training loss 0.2500, f1 not finite, up 3.00 MB, down 6.00 GB, 3 min left",
        "round 100 of 100: training loss 0.2500, accuracy 0.5000, up 150.00 MB, down 300.00 GB",
    ]


def test_clients_that_a_round_goes_on_without_are_named_once_until_they_are_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gone = {"client": 3, "reason": "it is not connected"}
    late = [{"client": k, "reason": "no reply"} for k in (1, 5)]
    with RunProgress(9, shown=True, label="fedavg") as bar:
        for round_, failures in enumerate([[], [gone], [gone, *late], [], [gone]], start=1):
            bar.row(row(round_) | {"failures": failures})
    said = [line for line in capsys.readouterr().err.splitlines() if "without" in line]
    assert said == [
        "round 2: without client 3: it is not connected",
        "round 3: without clients 1, 5: no reply",
        "round 5: without client 3: it is not connected",
    ]


def test_that_measurements_are_withheld_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(9, shown=True, label="fedavg") as bar:
        for round_ in (1, 2, 3):
            bar.row(row(round_) | {"clients": {"withheld": "too few"} if round_ > 1 else {}})
    said = [line for line in capsys.readouterr().err.splitlines() if "withheld" in line]
    assert len(said) == 1
    assert said[0].startswith("round 2: ")
    assert said[0].endswith("too few")


def test_what_the_log_has_said_is_not_said_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(9, shown=True, label="fedavg") as bar:
        logging.getLogger("fedraclora.engines.ray.pool").warning("worker %d was lost", 1)
        bar.row(row(1) | {"incidents": ["worker 1 was lost", "worker 2 is ready"]})
    lines = capsys.readouterr().err.splitlines()
    assert "round 1: worker 2 is ready" in lines
    assert "round 1: worker 1 was lost" not in lines


def test_a_run_that_is_resumed_is_timed_by_its_own_rounds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with RunProgress(100, shown=True, label="fedavg") as bar:
        bar.row(row(91, seconds=5.0))
    assert capsys.readouterr().err.endswith(", 45 s left\n")


def test_one_of_many_runs_says_how_far_it_is_only_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.02)
    with RunProgress(100, shown=True, label="fedavg", brief=True) as bar:
        bar.row(row(91, seconds=5.0))
        waited = time.monotonic()
        while time.monotonic() < waited + 0.2:
            bar.row(row(91, seconds=5.0))
    lines = capsys.readouterr().err.splitlines()
    assert 0 < len(lines) < 6
    assert all("92 of 100" in line and "45 s left" in line for line in lines)


def test_a_run_that_has_no_news_says_what_it_is_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "QUIET", 0.01)

    def said(what: str) -> bool:
        return what in capsys.readouterr().err or bool(time.sleep(0.01))

    with RunProgress(3, shown=True, label="fedavg") as bar:
        while not said("still starting, "):
            pass
        bar.row(row(1))
        while not said("still in round 2 of 3, "):
            pass
        bar.row(row(3))
        while not said("still closing, "):
            pass
        bar.stopping("run 7")
        while not said("still stopping run 7, "):
            pass


def test_nothing_is_shown_that_is_not_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    with RunProgress(100, shown=False, label="fedavg") as bar:
        bar.say("chunk: 3 clients")
        bar.row(row(1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_bar_keeps_its_estimate_however_narrow(
    width: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "drawn").open("w+") as file:

        def terminal(**_: object) -> Console:
            return Console(file=file, force_terminal=True, width=width, _environ={"TERM": "xterm"})

        monkeypatch.setattr(progress, "Console", terminal)
        with RunProgress(150, shown=True, label="asymmetric_lora r=4") as bar:
            bar.row(row(12))
            assert bar.drawn
        file.seek(0)
        drawn = file.read()
    assert "12/150  5 min left" in drawn
    assert ("asymmetric_lora r=4" in drawn.partition("12/150")[2]) == (width > 40)
    assert ("accuracy 0.5000" in drawn) == (width > 60)
    assert ("down" in drawn) == (width > 80)


def test_the_first_parts_matter_most() -> None:
    assert fitted(["fedavg", "3/9", "", "1 s left"], 21) == "fedavg  3/9  1 s left"
    assert fitted(["fedavg", "3/9", "", "1 s left"], 20) == "fedavg  3/9"
    assert fitted(["a long label", "3/9"], 5) == ""
