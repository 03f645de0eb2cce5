"""``fedraclora theory`` runs, writes its folder, and its exit status is its verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedraclora.commands.cli import main
from fedraclora.experiments.theory import command
from fedraclora.experiments.theory.verdict import Judged

FIGURES = {"rates", "sketches", "stochastic", "chain", "fewer_bits", "cover"}
FIGURES |= {"links", "counter_example", "noise_example", "slowdown"}


def status_of(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["theory", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.long  # what it asserts of curves, test_theory_bounds does of some
def test_a_small_run_holds_and_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no name is wrapped
    out = tmp_path / "here"
    assert status_of("size=small", "jobs=2", f"out={out}") == 0
    assert {path.stem for path in out.glob("*.png")} == FIGURES
    report = json.loads((out / "theory.json").read_text())
    assert report["holds"] is True
    assert report["seeds"] == 20
    cases = {case["name"]: case for case in report["cases"]}
    assert {case["case"]["theorem"] for case in cases.values()} == {
        "gd",
        "gd_link",
        "sgd",
        "reshuffling",
        "federated",
        "cover",
    }
    for case in cases.values():
        for curve in case["curves"].values():
            assert len(curve["mean"]) == len(curve["bound"]) == len(curve["rounds"])
            assert curve["holds"] is True
            if not curve["sure"]:
                held = [m - 3 * e for m, e in zip(curve["mean"], curve["error"], strict=True)]
                limit = [b + 1e-4 * curve["mean"][0] for b in curve["bound"]]  # six digits
                assert all(h <= b for h, b in zip(held, limit, strict=True))
    assert {o["method"] for o in report["counter_example"]} >= {"full", "LoRA", "RAC-LoRA"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in cases)
    assert f"{len(cases)} of {len(cases)} cases within their bounds" in printed
    assert all(name in (out / "table.md").read_text() for name in cases)


@pytest.mark.long
def test_a_curve_that_crosses_its_bound_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = command.all_cases("small")[:2]
    monkeypatch.setattr(command, "all_cases", lambda size: cases)
    monkeypatch.setattr(command.examples, "trials", lambda name, size, seeds: [])
    monkeypatch.setattr(Judged, "holds", property(lambda self: self.case.name != cases[1].name))
    assert status_of("size=small", "seeds=2", "jobs=1", f"out={tmp_path}") == 1
    assert f"error: {cases[1].name} crosses its bound" in capsys.readouterr().err
    assert json.loads((tmp_path / "theory.json").read_text())["holds"] is False


@pytest.mark.parametrize(
    ("word", "said"), [("size=huge", "huge"), ("seeds=1", "seeds=1"), ("fast", "key=value")]
)
def test_bad_words_are_named(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(word) == 1
    assert said in capsys.readouterr().err


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("--help") == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in ("size=", "seeds=", "jobs=", "out="))
