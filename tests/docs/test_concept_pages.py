"""The pages for newcomers: their programs run, and print what stands below them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_the_glossary_is_sorted_and_has_no_term_twice() -> None:
    terms = re.findall(r"^\| \*\*(.+?)\*\*", (DOCS / "glossary.md").read_text(), re.MULTILINE)
    assert len({*terms}) == len(terms)
    initials = [term[0].lower() for term in terms]
    assert initials == sorted(initials)
