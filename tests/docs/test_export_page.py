"""The page on exports: its commands and its lines of Python run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

import fedraclora
from fedraclora.commands import cli
from fedraclora.export import FORMATS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
SMALL = [
    *("data=virtual", "data.held_out=50", "data.samples=20", "model.hidden=[9]", "clients=5"),
    *("clients_per_round=5", "rounds=2", "output.plots=false", "output.progress=false"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0


@pytest.fixture
def first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedraclora"])
    return fedraclora.simulate(*SMALL, folder="runs/first")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_page_runs_as_it_stands(first, tmp_path):
    exports, begins = blocks("bash")
    commands = [shlex.split(line, comments=True) for line in exports.splitlines()]
    for command in commands:
        if "hf" in command:  # the model of this small run is none of transformers
            continue
        run(command[1:])
    for folder in ("runs/first/export/peft", "weights", "small", "early"):
        assert (tmp_path / folder / "README.md").is_file()
    for name in ("weights", "small"):
        (tmp_path / name).rename(tmp_path / f"{name}-of-the-command")
    exec("\n".join(blocks("python")), {"run": first})
    (again,) = begins.splitlines()
    run([*shlex.split(again)[1:], *SMALL])
    assert (tmp_path / "runs" / "second" / "summary.json").is_file()


def test_the_page_names_every_format():
    part = PAGE.read_text(encoding="utf-8").split("## The formats")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)
    assert sorted(rows) == sorted(FORMATS)
