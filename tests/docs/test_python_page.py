"""The page on Python, read from top to bottom as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for k, block in enumerate(BLOCKS):
        exec(compile(block, PAGE.name, "exec"), names)
        if k == 0:
            first: Any = names["run"]
            assert first.history["accuracy"].iloc[-1] > 0.7
    assert (tmp_path / "curves.png").is_file()
    assert (tmp_path / "result" / "model.safetensors").is_file()
    assert (tmp_path / "runs/mine/summary.json").is_file()
