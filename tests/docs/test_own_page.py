"""The page of one's own parts, read from top to bottom: its module, its program, its commands."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.strategies.methods import METHODS

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "own.md").read_text()
PROGRAM = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [
    line
    for block in re.findall(r"```bash[^\n]*\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(DOCS / "examples" / "mine.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.mark.slow
def test_the_program_of_the_page_runs(folder: Path) -> None:
    names: dict[str, object] = {}
    for block in PROGRAM:
        exec(compile(block, "own.md", "exec"), names)


@pytest.mark.slow
def test_the_program_of_the_page_on_training_runs() -> None:
    page = (DOCS / "training.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program, "training.md", "exec"), names)
    assert len(names["run"].rows) == 4


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_of_the_page_composes(folder: Path, line: str) -> None:
    from_plain(composed(shlex.split(line)[2:]), METHODS)
