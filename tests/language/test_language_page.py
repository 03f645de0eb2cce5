"""The first look of docs/language-models.md runs as it is typed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from chats import save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "language-models.md").read_text()


def test_the_first_look_runs_as_it_is_typed(questions: Path, tmp_path: Path) -> None:
    """With a tokenizer that has no template of its own, the page's template serves."""
    (tmp_path / "words").mkdir()
    save_tokenizer(tmp_path / "words", None)
    (line,) = (s for s in PAGE.splitlines() if s.startswith("fedraclora simulate experiment=tiny"))
    found = re.search(r"```jinja\n(.*?)\n```", PAGE, re.DOTALL)
    assert found
    (tmp_path / "chat.jinja").write_text(found[1])

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "experiments.cli", *line.split()[1:], *words, "output.dir=run"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    refused = run("rounds=1")
    assert refused.returncode == 1
    assert "has no chat template: set data.template" in refused.stdout + refused.stderr
    done = run("data.template=chat.jinja")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["exact_match"] == 1.0
    assert summary["metrics"]["token_accuracy"] == 1.0
