"""Tables of results in the pages are those of the results, and how they are brought there."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedraclora.commands.cli import USAGE
from fedraclora.errors import ConfigError
from fedraclora.experiments.pages import BLOCK, PAGES, ROOT, filled, read_table, usage

TABLE = """| method | lr | accuracy | std | bytes |
| --- | ---: | ---: | ---: | ---: |
| Fed-RAC-LoRA | 1 | 0.9 | 0.01 | 5 |
| FedAvg | 2 | 0.8 | nan | 7 |
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.md").write_text(TABLE)
    (tmp_path / "b" / "table.md").write_text(TABLE.replace("0.9", "0.7").replace("FedAvg", "FFA"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_page_shows_the_results_of_record(page: Path) -> None:
    text = page.read_text()
    assert text == filled(text), "run python -m fedraclora.experiments.pages"
    assert text.count("<!-- end -->") == len(BLOCK.findall(text)), "a block without its end"


def test_help_lists_the_choices_that_there_are() -> None:
    assert USAGE.read_text() == usage(), "run python -m fedraclora.experiments.pages"


def test_a_table_is_brought_whole_or_by_columns(results: Path) -> None:
    whole = "x\n<!-- table a/table.md -->\nold\n<!-- end -->\n"
    page = f"{whole}y <!-- table a/table.md: acc, by -->\n<!-- end -->\n"
    made = filled(page, results)
    assert "old" not in made
    assert TABLE in made
    assert "| Fed-RAC-LoRA | 0.9 ± 0.01 | 5 |" in made
    assert "| FedAvg | 0.8 | 7 |" in made
    assert filled(made, results) == made


def test_studies_stand_side_by_side(results: Path) -> None:
    made = filled("<!-- beside table.md: accuracy: one=a, b -->\n<!-- end -->", results)
    assert "| method | one | b |" in made
    assert "| Fed-RAC-LoRA | 0.9 ± 0.01 | 0.7 ± 0.01 |" in made
    assert "| FedAvg | 0.8 |  |" in made
    assert "| FFA |  | 0.8 |" in made


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("table c/table.md", "run its study first"),
        ("table a/table.md: loss", r"no column .*'loss'"),
        ("beside table.md: accuracy", "wanted"),
        ("bench", "holds no figures"),
        ("bench A", "holds no figures"),
        ("bench A: vectorized", "holds no figures"),
    ],
)
def test_what_is_not_there_is_named(results: Path, head: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        filled(f"<!-- {head} -->\n<!-- end -->", results)


def test_a_file_without_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.md").write_text("nothing\n")
    with pytest.raises(ConfigError, match="contains no table"):
        read_table(tmp_path / "t.md")
