"""The short form of the campaign of Python objects, and that it sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.campaigns.objects import USUAL, Ended, attempt, drawn, judged, plug_ins, wanted
from tests.campaigns.odd_objects import PARTS
from tests.campaigns.odd_plugins import PLUG_INS

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "data, client 2: x holds NaN or an infinity, first in row 3: leave it out"


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, pytest.param(120, marks=pytest.mark.long)])
def test_objects_run_right_or_are_refused_in_a_sentence(times: int) -> None:
    module = ("-m", "tests.campaigns.objects", "--times", str(times), "--seed", "1")
    words = [sys.executable, *module]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{times} cases, 0 failures of 0 kinds" in done.stdout


@pytest.mark.long
def test_each_plug_in_object_is_used_right_or_named() -> None:
    words = [sys.executable, "-m", "tests.campaigns.objects", "--plug-ins"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{len(plug_ins())} cases, 0 failures of 0 kinds" in done.stdout


def test_plug_in_objects_are_many_and_of_all_kinds() -> None:
    cases = plug_ins()
    assert len(cases) >= 200
    assert len({str(case) for case in cases}) == len(cases)
    for part, kinds in PLUG_INS.items():
        ends = {wanted(case) for case in cases if case.get(part) in kinds}
        assert "refused" in ends
        assert part in {"loss", "partition"} or "runs" in ends


def test_cases_are_a_function_of_seed_and_number() -> None:
    assert drawn(0, 3) == drawn(0, 3)
    cases = [drawn(seed, number) for seed in range(2) for number in range(40)]
    assert len({str(case) for case in cases}) > 60
    assert {wanted(case) for case in cases} >= {"runs", "refused"}
    assert all(len(kinds) > 3 for kinds in PARTS.values())


@pytest.mark.parametrize(
    ("parts", "ended", "kind"),
    [
        ({}, Ended(("KeyError", SENTENCE), known=False), "traceback"),
        ({}, Ended(("DataError", "3"), known=True), "words"),
        ({}, Ended(("DataError", f"<function at 0x7f12> {SENTENCE}"), known=True), "words"),
        ({}, Ended(("DataError", SENTENCE), known=True), "refused"),
        ({"data": "masked"}, Ended(), "silent"),
        ({"model": "all frozen"}, Ended(said="round 1"), "silent"),
        ({}, Ended(wrong="numbers: 3 clients of 4"), "numbers"),
        ({}, Ended(status="SIGXCPU"), "hung"),
        ({}, Ended(status="SIGSEGV"), "died"),
        ({}, Ended(status=97), "died"),
    ],
)
def test_what_is_wrong_is_seen(parts: dict[str, str], ended: Ended, kind: str) -> None:
    assert str(judged(USUAL | parts, ended)).startswith(kind)


@pytest.mark.parametrize(
    ("parts", "ended"),
    [
        ({}, Ended()),
        ({"data": "masked"}, Ended(("DataError", SENTENCE), known=True)),
        ({"model": "all frozen"}, Ended(said="requires_grad=False of 0.weight is not read")),
    ],
)
def test_what_is_right_is_let_pass(parts: dict[str, str], ended: Ended) -> None:
    assert judged(USUAL | parts, ended) is None


PLANTED: dict[str, tuple[str, Any, dict[str, str], str]] = {
    "masks are lost": (
        "fedraclora.data.encoders.array.is_masked",
        lambda _: False,
        {"data": "masked"},
        "silent",
    ),
    "modes are not looked at": (
        "fedraclora.models.outputs.refuse_ways",
        lambda *_: None,
        {"model": "doubled in training"},
        "silent",
    ),
    "callbacks get the live row": (
        "fedraclora.strategies.server.callbacks.copy",
        SimpleNamespace(deepcopy=lambda row: row),
        {"on_round": "one that writes"},
        "",
    ),
    "figures are of other samples": (
        "tests.campaigns.objects.measured",
        lambda _: {"accuracy": 0.123},
        {},
        "numbers: row 0",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("defect", PLANTED)
def test_a_defect_that_is_planted_is_seen(
    defect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, other, parts, kind = PLANTED[defect]
    assert judged(USUAL | parts, attempt(USUAL | parts, tmp_path / "whole")) is None
    monkeypatch.setattr(place, other)
    found = judged(USUAL | parts, attempt(USUAL | parts, tmp_path / "planted"))
    assert found is not None
    assert found.startswith(kind)
