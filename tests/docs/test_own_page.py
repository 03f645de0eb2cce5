"""The page of one's own parts, read from top to bottom: its module, its program, its commands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from fedraclora.config.run_config import from_plain
from fedraclora.experiments.overrides import composed
from fedraclora.strategies import METHODS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
MINE = [block for block in BLOCKS if block.startswith("# mine.py\n")]
PROGRAM = [block for block in BLOCKS if block not in MINE]
COMMANDS = [
    line
    for block in re.findall(r"```bash[^\n]*\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text("\n".join(MINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_the_program_of_the_page_runs(folder: Path) -> None:
    names: dict[str, object] = {}
    for block in PROGRAM:
        exec(compile(block, "own.md", "exec"), names)


def test_the_program_of_the_page_on_training_runs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(program, "training.md", "exec"), names)
    assert len(names["run"].rows) == 4


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_of_the_page_composes(folder: Path, line: str) -> None:
    from_plain(composed(shlex.split(line)[2:]), METHODS)
