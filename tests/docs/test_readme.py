"""Commands of the README and of docs/commands.md exist: targets and overrides that compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedraclora.commands.cli import COMMANDS
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.strategies.methods import METHODS

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


def table(text: str) -> dict[int, dict[str, float]]:
    """A printed frame: round -> column -> number."""
    names, _, *lines = text.strip().splitlines()
    cells = [line.split() for line in lines]
    return {int(r): dict(zip(names.split(), map(float, row), strict=True)) for r, *row in cells}


@pytest.mark.slow
def test_the_first_lines_of_python_learn_and_print_what_stands_below_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block, said), *_ = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    shown, wanted = table(capsys.readouterr().out), table(said)
    assert wanted[20]["accuracy"] > wanted[0]["accuracy"] + 0.3
    for round_, row in wanted.items():
        for name, value in row.items():  # another processor may round a product differently
            near = {"abs": 0.05} if name == "accuracy" else {"rel": 0}
            assert shown[round_][name] == pytest.approx(value, **near), (round_, name)
