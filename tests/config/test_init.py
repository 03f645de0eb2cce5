"""Projects that are written: what is refused, and that the code is clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedraclora.commands.init import command as init
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ConfigError
from fedraclora.strategies.methods import METHODS


def test_nothing_of_a_template_is_left_over(tmp_path: Path) -> None:
    folder = init.write_project("shop", tmp_path)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    code = {"data.py", "model.py", "run.py", "test_shop.py"}
    assert files.keys() == {"README.md", "conf/experiment/shop.yaml"} | code
    assert not [path for path, file in files.items() if "$" in file.read_text()]


@pytest.mark.slow
def test_the_code_is_clean(tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    init.write_project("shop", tmp_path)
    for words in (["check", "--select", "A,B,E,F,I,N,RUF,UP,W"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *words, "--isolated", "--line-length", "100", "."]
        subprocess.run(ruff, cwd=tmp_path / "shop", check=True)


def test_preset_and_script_say_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = init.write_project("shop", tmp_path)
    monkeypatch.chdir(folder)
    config = from_plain(composed(["--config-dir", "conf", "experiment=shop"]), METHODS)
    preset = yaml.safe_load((folder / "conf/experiment/shop.yaml").read_text())
    script = (folder / "run.py").read_text()
    assert config.rounds == preset["rounds"]
    assert f"rounds={preset['rounds']}," in script
    for key, value in preset["local"].items():
        assert f'"{key}": {value}' in script


@pytest.mark.parametrize("name", ["", "a-b", "a/b", "9a", "true", "null", "é", "../up", "glue"])
def test_a_name_that_will_not_do_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name"):
        init.write_project(name, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_what_lies_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        init.write_project("shop", tmp_path)
    assert [p.name for p in (tmp_path / "shop").iterdir()] == ["mine.txt"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    assert init.write_project("shop", tmp_path) == tmp_path / "shop"
