"""What the page of the methods is made of."""

from __future__ import annotations

from pathlib import Path

from fedraclora.experiments.pages import RESULTS, ROOT, board, method_of, methods
from fedraclora.strategies import METHODS

PAGE = (ROOT / "docs" / "methods.md").read_text()


def test_every_method_is_there_with_its_file() -> None:
    for name, kind in METHODS.items():
        assert f"| `{name}`" in PAGE
        path = kind.__module__.removeprefix("fedraclora.").replace(".", "/")
        assert f"(../{path}.py)" in PAGE


def test_traits_and_marks_are_those_of_the_method() -> None:
    rows = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    for name in METHODS:
        exact = [cell.strip() for cell in rows[name].split("|")][3]
        assert exact == ("yes" if method_of(name).traits.exact else "no")
    assert "`fedkrso` †" in rows["fedkrso"]
    assert "†" not in rows["fedavg"]


def test_a_board_is_shown_once_it_is_there(tmp_path: Path) -> None:
    assert board("small", tmp_path).startswith("Not run yet: `fedraclora compare experiment=small")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "leaderboard.md").write_text("| method |\n| --- |\n| a |\n")
    shown = board("small", tmp_path)
    assert "| a |" in shown
    assert "(../../experiments/results/small/leaderboard.png)" in shown


def test_what_servers_cost_comes_from_the_record(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir()
    text = (RESULTS / "servers" / "README.md").read_text()
    (tmp_path / "servers" / "README.md").write_text(
        text.replace("| fedsvd | 0.01 |", "| fedsvd | 7 |")
    )
    (row,) = [line for line in methods(tmp_path).splitlines() if line.startswith("| `fedsvd`")]
    assert row.endswith("| 7 |")
