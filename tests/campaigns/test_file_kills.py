"""A short form of the campaign of kills; see `tests.campaigns.file_kills`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "every"),
    [
        (["carried", "compacted"], 30),
        pytest.param(["extended"], 10, marks=pytest.mark.long),
        pytest.param(["fed_rac_lora", "moments", "private"], 10, marks=pytest.mark.long),
    ],
)
def test_a_process_that_dies_at_a_file_operation_goes_on(kinds: list[str], every: int) -> None:
    # In a process of its own: trials are forked, which goes badly beside threads.
    words = ["-m", "tests.campaigns.file_kills", "--every", str(every), "--kinds", *kinds]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 wrong" in done.stdout
