"""The first look of docs/language-models.md runs as it is typed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from chats import save_tokenizer

from fedraclora.commands import cli
from tests.common import summary_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "language-models.md").read_text()


def block(language: str) -> str:
    """The first block of a language on the page."""
    found = re.search(rf"```{language}\n(.*?)\n```", PAGE, re.DOTALL)
    assert found
    return found[1]


@pytest.mark.slow
def test_the_first_look_runs_as_it_is_typed(
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedraclora"])  # Hydra is handed its words this way
    exec(compile(block("python"), "language-models.md", "exec"), {})
    line = next(s for s in PAGE.splitlines() if s.endswith("data.client=who"))

    def run(*words: str) -> object:
        with pytest.raises(SystemExit) as ended:
            cli.main([*line.split()[1:], *words])
        return ended.value.code

    assert run("output.dir=run") == 0
    summary = summary_of(tmp_path / "run")
    assert summary["metrics"]["exact_match"] == 1.0
    # A tokenizer without a template of its own is refused; that of the page serves.
    (tmp_path / "bare").mkdir()
    bare = f"data.tokenizer={save_tokenizer(tmp_path / 'bare', None)}"
    own = f"data.file={questions}"
    assert run(bare, own, "rounds=1", "output.dir=other") == 1
    assert "no chat template" in capsys.readouterr().err
    (tmp_path / "chat.jinja").write_text(block("jinja"))
    assert run(bare, own, "data.template=chat.jinja", "output.dir=other") == 0
    summary = summary_of(tmp_path / "other")
    assert summary["metrics"]["exact_match"] == 1.0
    assert summary["metrics"]["token_accuracy"] == 1.0
