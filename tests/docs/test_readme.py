"""Commands of the README and of docs/commands.md exist: targets, overrides that compose, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedraclora.config.run_config import from_plain
from fedraclora.experiments.choices import composed
from fedraclora.experiments.cli import COMMANDS
from fedraclora.strategies import METHODS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text()
LINES = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash[^\n]*\n(.*?)```", README + COMMANDS_PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.partition("#")[0].strip()
]
SIMULATIONS = [line for line in LINES if line.startswith("fedraclora simulate")]


def test_there_are_commands() -> None:
    assert SIMULATIONS
    assert any(line.startswith("make ") for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_each_command_exists(line: str) -> None:
    program, word, *_ = shlex.split(line.replace("<", "").replace(">", ""))
    if program == "make":
        assert re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "python":
        module = ROOT / shlex.split(line)[2].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
    elif program == "pip":
        assert (ROOT / line.rsplit(maxsplit=1)[-1]).is_file()
    else:
        assert program == "fedraclora"
        assert word in {*COMMANDS, "--help"}


@pytest.mark.parametrize("line", SIMULATIONS)
def test_each_simulation_composes(line: str) -> None:
    words = [w for w in line.split()[2:] if "=" in w and "<" not in w]
    keys = [w.partition("=") for w in words]
    first = [f"{k}={v if v.startswith('[') else v.split(',')[0]}" for k, _, v in keys]
    from_plain(composed(first), METHODS)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_each_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_first_lines_of_python_run(capsys: pytest.CaptureFixture[str]) -> None:
    (block, *_) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert "uplink_total" in capsys.readouterr().out
