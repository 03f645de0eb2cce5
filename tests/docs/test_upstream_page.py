"""What the page for Flower's maintainers says of Flower is so, in the Flower that is installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedraclora.engines.flower_patches import PATCHES

PAGE = (Path(__file__).parents[2] / "docs" / "flower-upstream.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"\n## ([^\n]*)\n.*?```python\n(.*?)```\n+```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "program", "printed"), SHOWN, ids=[each[0] for each in SHOWN])
def test_flower_does_what_the_page_shows(title: str, program: str, printed: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == printed, (
        f"{title}: Flower has changed, or the page is wrong: {done.stderr}"
    )


def test_each_section_is_shown_and_each_patch_has_a_row() -> None:
    assert len(SHOWN) == PAGE.count("\n## ")
    for patch in PATCHES:
        assert f"`{patch.name}`" in PAGE
