"""The wheel in an environment of its own, used from an empty folder far from the checkout."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# What a user types in the folder where a run lies in `first` -> a file that is there then. A new
# command that reads a run has one line here.
LINES = {
    "fedraclora compare first --out compared": "compared/table.csv",
    "fedraclora simulate resume=first rounds=2": "first/chain/000002.safetensors",
    "fedraclora report first": "first/report.html",
    "fedraclora export first --format state_dict --out exported": "exported/model.safetensors",
}
# They are typed to one process, which imports torch once.
TYPED = """
import sys
from fedraclora.commands.cli import main

for line in sys.argv[1:]:
    try:
        main(line.split()[1:])
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line} ends with {end.code}")
"""

Shell = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def shell(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Give what runs a line in an environment with the wheel.

    What it depends on is seen in the environment of the tests, so that nothing is downloaded.
    """
    pytest.importorskip("hatchling")
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("installed")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str, cwd: Path, **variables: str) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=clean | variables, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place), cwd=ROOT)
    venv.create(place / "venv", with_pip=False, symlinks=True)
    python = str(place / "venv" / "bin" / "python")
    paths = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", paths, cwd=place).strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, str(next(place.glob("*.whl"))), cwd=place)
    path = f"{place / 'venv' / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"

    def typed(line: str, cwd: Path = folder, **variables: str) -> str:
        program, *words = shlex.split(line)
        return run(str(place / "venv" / "bin" / program), *words, cwd=cwd, PATH=path, **variables)

    return typed


@pytest.fixture(scope="module")
def used(folder: Path, shell: Shell) -> Path:
    """The folder with a preset of the user's, a run of it, and a script."""
    (folder / "mine" / "experiment").mkdir(parents=True)
    # Drawn samples: a process imports no library for data or partitions.
    preset = ["# @package _global_", "defaults: [override /data: virtual]"]
    preset += ["data: {samples: 20, held_out: 50}", "clients: 6"]
    preset += ["clients_per_round: 3", "rounds: 1"]
    preset += ["output: {progress: false, plots: false}"]
    (folder / "mine" / "experiment" / "little.yaml").write_text("\n".join(preset))
    shell("fedraclora simulate --config-dir mine experiment=little output.dir=first")
    page = (ROOT / "docs" / "python.md").read_text()
    five = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    (folder / "five.py").write_text(f"{five}\nrun.save('kept')\n")
    return folder


def test_the_code_is_that_of_the_wheel(shell: Shell) -> None:
    where = shell("python -c 'from fedraclora import commands; print(commands)'")
    assert str(ROOT) not in where


@pytest.mark.parametrize("command", ["bench", "theory"])
def test_commands_of_the_laboratory_say_where_they_are(shell: Shell, command: str) -> None:
    with pytest.raises(AssertionError, match=rf"{command} needs .*source checkout"):
        shell(f"fedraclora {command}")


def test_each_command_that_reads_a_run_does_its_work(used: Path, shell: Shell) -> None:
    shell(shlex.join(["python", "-c", TYPED, *LINES]))
    assert [line for line, file in LINES.items() if not (used / file).exists()] == []


@pytest.mark.long  # it runs in test_python_page
def test_five_lines_do_their_work(used: Path, shell: Shell) -> None:
    shell("python five.py")
    assert (used / "kept" / "model.safetensors").exists()


def test_tab_completes(used: Path, shell: Shell) -> None:
    line = "fedraclora simulate --config-dir mine experiment=lit"
    assert shell("fedraclora -sc query=bash", COMP_LINE=line).split() == ["experiment=little"]


@pytest.mark.long
def test_a_project_is_written_and_runs_as_its_page_says(folder: Path, shell: Shell) -> None:
    shell("fedraclora init shop")
    project = folder / "shop"
    lines = re.search(r"```bash\n(.*?)```", (project / "README.md").read_text(), re.DOTALL)
    assert lines is not None
    simulate, script, test = lines[1].splitlines()
    assert (script, test) == ("python run.py", "pytest")
    shell(f"{simulate} rounds=2 output.dir=run", project)
    assert (project / "run" / "summary.json").is_file()
    assert "accuracy" in shell(script, project)
    assert (project / "curves.png").is_file()
    assert "2 passed" in shell("python -m pytest -p no:cacheprovider", project)
