"""The pages for newcomers: their programs run, and print what stands below them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fedraclora

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["concepts.md", "coming-from.md"])
def test_the_programs_of_a_page_run_and_print_what_stands_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = BLOCK.findall((DOCS / name).read_text())
    assert len(blocks) >= 2
    for code, said in blocks:
        capsys.readouterr()
        exec(compile(code, name, "exec"), names)
        if said:
            assert capsys.readouterr().out.endswith(said)


@pytest.mark.slow
def test_what_separate_averages_miss_is_what_a_run_reports(tmp_path: Path) -> None:
    page = (DOCS / "concepts.md").read_text()
    said = re.search(
        r"misses ([\d.]+) % of the update in the median round, ([\d.]+) % on average over the "
        r"(\d+) rounds,\s+and ([\d.]+) % in the worst",
        page,
    )
    assert said is not None
    median, mean, rounds, worst = map(float, said.groups())
    run = fedraclora.simulate("method=fedavg_lora", folder=tmp_path, output={"progress": False})
    missed = 100 * run.history["report.aggregation_error"].dropna()
    assert len(missed) == rounds
    assert missed.median() == pytest.approx(median, abs=1)
    assert missed.mean() == pytest.approx(mean, abs=2)
    assert missed.max() == pytest.approx(worst, abs=25)  # a single round: processors round apart


def test_the_glossary_is_sorted_and_has_no_term_twice() -> None:
    terms = re.findall(r"^\| \*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len({*terms}) == len(terms)
    initials = [term[0].lower() for term in terms]
    assert initials == sorted(initials)
