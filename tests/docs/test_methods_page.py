"""What the page of the methods is made of."""

from __future__ import annotations

import re
from pathlib import Path

from fedraclora.experiments.pages import ROOT, aliases, board, method_of
from fedraclora.strategies.methods import METHODS

PAGE = (ROOT / "docs" / "methods.md").read_text()


def test_every_method_is_there_with_its_file() -> None:
    for name, kind in METHODS.items():
        assert f"| `{name}`" in PAGE
        path = kind.__module__.removeprefix("fedraclora.").replace(".", "/")
        assert f"(../{path}.py)" in PAGE


def test_methods_under_two_names_are_counted_once() -> None:
    distinct = len(METHODS) - len(aliases())
    for name in ("README.md", "CITATION.cff", "pyproject.toml", "CHANGELOG.md"):
        (found,) = re.findall(r"(\d+) \[?other methods", (ROOT / name).read_text())
        assert int(found) == distinct - 1, name  # beside Fed-RAC-LoRA
    assert f"{distinct} methods under {len(METHODS)} names" in PAGE
    assert len(re.findall(r"`\w+` \(= `\w+`\)", PAGE)) == len(aliases())


def test_traits_and_marks_are_those_of_the_method() -> None:
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    for name in METHODS:
        traits = rows[name].split("|")[3].strip()
        assert ("exact" in traits) == method_of(name).traits.exact
        assert ("ranks" in traits) == method_of(name).traits.ranks
        assert ("state" in traits) == method_of(name).client_state


def test_a_board_is_shown_once_it_is_there(tmp_path: Path) -> None:
    assert board("small", tmp_path).startswith("Not run yet: `fedraclora compare study=small")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "leaderboard.md").write_text("| method |\n| --- |\n| a |\n")
    shown = board("small", tmp_path)
    assert "| a |" in shown
    assert "(../../experiments/results/small/leaderboard.png)" in shown
