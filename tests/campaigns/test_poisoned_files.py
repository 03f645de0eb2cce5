"""The short form of the campaign of poisoned files, and that it sees what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.poisoned_files import (
    IN_PYTHON,
    KEYS,
    NAMES,
    ON_CHECKS,
    ON_FOLDERS,
    ON_PRESETS,
    PICKLES,
    SECRET,
    TEXTS,
    Case,
    Ended,
    drawn,
    judged,
)

ROOT = Path(__file__).resolve().parents[2]
REFUSED = (
    "error: there names code that would be run: data.loss=os:system; if you trust it, say so\n"
)
LOSS = {"data.loss": ("os:system", True)}


@pytest.mark.long
def test_nothing_of_poisoned_files_runs() -> None:
    module = ("-m", "tests.campaigns.poisoned_files", "--times", "60", "--seed", "1")
    words = [sys.executable, *module]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "60 cases, 0 failures of 0 kinds" in done.stdout


def test_cases_are_a_function_of_seed_and_number_and_reach_every_kind() -> None:
    assert drawn(0, 3) == drawn(0, 3)
    cases = [drawn(0, number) for number in range(500)]
    assert {case.command for case in cases} == {*ON_FOLDERS, *IN_PYTHON, *ON_PRESETS, *ON_CHECKS}
    assert {key for case in cases for key in case.named} == {*KEYS}
    assert {name for case in cases for name, _ in case.named.values()} == {*NAMES}
    assert {case.beside for case in cases} == {"", *TEXTS, *PICKLES}


@pytest.mark.parametrize(
    ("case", "ended", "left", "kind"),
    [
        (Case("=evaluate", LOSS), Ended(1, REFUSED), "", None),
        (Case("=evaluate", LOSS), Ended(1, REFUSED), "canary", "executed"),
        (Case("=evaluate", LOSS), Ended(1, REFUSED), "config.yaml", "executed: the secret"),
        (Case("=evaluate", LOSS), Ended(0, ""), "", "taken"),
        (Case("compare", LOSS), Ended(0, ""), "", None),
        (Case("=evaluate", LOSS), Ended(1, REFUSED.replace("os:system", "")), "", "unnamed"),
        (Case("=evaluate", LOSS), Ended(1, "error: no\n"), "", "words"),
        (Case("=evaluate", LOSS), Ended(1, REFUSED, traced=True), "", "traceback"),
        (Case("=evaluate", LOSS), Ended("SIGXCPU"), "", "hung"),
        (Case("=evaluate", LOSS), Ended("nothing"), "", "died"),
    ],
)
def test_what_is_wrong_is_seen(
    case: Case, ended: Ended, left: str, kind: str | None, tmp_path: Path
) -> None:
    if left:
        (tmp_path / left).write_text(SECRET * (left != "canary"))
    assert str(judged(case, ended, tmp_path)).startswith(str(kind))
