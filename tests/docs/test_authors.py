"""What methods say they are held to is what was compared; others' code is loaded as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedraclora.commands.study.entries import docstring
from fedraclora.config.keys import bullet
from fedraclora.errors import ConfigError
from fedraclora.experiments.authors.__main__ import checks, is_new, kept, run
from fedraclora.experiments.authors.check import CodeCheck
from fedraclora.experiments.authors.code import Repository
from fedraclora.strategies.methods import METHODS

CHECKS = checks()


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_kept_of_a_check_is_of_its_commit_and_within_what_it_allows(name: str) -> None:
    found: dict[str, Any] = kept()[name]
    assert not is_new(CHECKS[name], found)
    assert max(found["difference"].values()) <= CHECKS[name].within


def test_methods_say_what_they_were_compared_with() -> None:
    said = {docstring(kind): bullet(docstring(kind), "Held to") for kind in METHODS.values()}
    told = dict.fromkeys(said, 0)
    for check in CHECKS.values():
        if check.method in METHODS:
            text = docstring(METHODS[check.method])
            assert f"{check.repository} at {check.commit}: {check.compared}" in said[text]
            told[text] += 1
    assert {text: bullets.count(" at ") for text, bullets in said.items()} == told


@pytest.fixture
def clone(tmp_path: Path) -> Repository:
    """A repository with a file that imports another, and a package that is not there."""
    files = {
        "code/agg.py": "import absent.deep\nfrom helper import two\n"
        "from absent import Base\n\nclass Server(Base):\n    def mean(self):\n        return two\n",
        "code/helper.py": "two = 2\n",
    }
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "code" / "helper.py").write_text("two = 3\n")  # not what was committed
    return Repository("owner/name", "HEAD", tmp_path)


@pytest.mark.slow
def test_code_is_loaded_as_it_is_at_the_commit_and_leaves_nothing_behind(clone: Repository) -> None:
    before = dict(sys.modules)
    paths = ("code/helper.py", "code/agg.py")
    with clone.modules(*paths, root="code", unused=("absent", "absent.deep")) as [_, agg]:
        assert agg.Server.mean(None) == 2
    assert {*sys.modules} == {*before}
    with pytest.raises(ConfigError, match=r"owner/name.*none\.py"):
        clone.file("none.py")


def test_a_difference_that_is_too_large_is_an_error(tmp_path: Path) -> None:
    far = CodeCheck("fedavg", "owner/name", "abc", "nothing", lambda _: {"W": 0.1, "A": 0.0})
    with pytest.raises(ConfigError, match=r"W.*0\.1"):
        run("far", far, tmp_path)
