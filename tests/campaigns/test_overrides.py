"""The short form of the campaign of override sets, and that it sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.overrides import SMALL, Ended, drawn, judged

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"seed": 0, "local": {"lr": 0.5, "dp": None}, "method": {"name": "fed_rac_lora"}}


@pytest.mark.slow
@pytest.mark.parametrize("times", [4, pytest.param(60, marks=pytest.mark.long)])
def test_sets_run_or_are_refused_in_one_message(times: int) -> None:
    words = [
        sys.executable,
        "-m",
        "tests.campaigns.overrides",
        "--times",
        str(times),
        "--seed",
        "1",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{times} sets, 0 failures of 0 kinds" in done.stdout


def test_sets_are_a_function_of_seed_and_number() -> None:
    assert drawn(0, 3) == drawn(0, 3)
    assert len({str(drawn(seed, number)) for seed in range(2) for number in range(20)}) > 30


@pytest.mark.parametrize(
    ("words", "ended", "kind"),
    [
        (
            [],
            Ended(1, "Traceback ...\nKeyError: 'x'\nerror: this is a bug", None, False),
            "traceback",
        ),
        ([], Ended(1, "error: a\nerror: b\n", None, False), "words"),
        ([], Ended(1, "no word of it\n", None, False), "words"),
        ([], Ended(1, "error: a='\x1b[2J': expected 4\n", None, False), "signs"),
        ([], Ended(1, "error: a=3: expected 4\n", None, True), "folder"),
        ([], Ended("SIGXCPU", "", None, False), "hung"),
        ([], Ended("SIGSEGV", "", None, False), "died"),
        ([], Ended(0, "", None, False), "died"),
        (["+foo=1"], Ended(0, "", {**CONFIG, "foo": 1}, True), "unknown"),
        (["+local.foo=1"], Ended(0, "", CONFIG, True), "dropped"),
        (["seed=1"], Ended(0, "", CONFIG, True), "dropped"),
        (["local.lr=1"], Ended(0, "", CONFIG, True), "dropped"),
    ],
)
def test_what_is_wrong_is_seen(words: list[str], ended: Ended, kind: str) -> None:
    assert str(judged(words, ended)).startswith(kind)


@pytest.mark.parametrize(
    ("words", "ended"),
    [
        (["seed=0", "local.lr=0.5"], Ended(0, "", CONFIG, True)),
        (["local.dp=null", "method=fed_rac_lora"], Ended(0, "", CONFIG, True)),
        (["seed=${local.lr}"], Ended(0, "", CONFIG, True)),
        (["seed=1", "seed=0"], Ended(0, "", CONFIG, True)),
        (["seed=a"], Ended(1, "error: seed='a': expected int\n", None, False)),
        (["local.lr=1e30"], Ended(1, "error: round 1: 4 client(s) failed\n", CONFIG, True)),
    ],
)
def test_what_is_right_is_let_pass(words: list[str], ended: Ended) -> None:
    assert judged(words, ended) is None
    assert SMALL[0] == "data=digits"
