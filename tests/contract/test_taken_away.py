"""A method goes with its file, its row and its YAML, and what is left is whole.

All go at once, but for those on which others build and which shared tests take as examples. The
laboratory, `experiments`, compares methods and is left out, as it is of the wheel.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedraclora.strategies.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
KEPT = {"fed_rac_lora", "fedavg", "fedavg_lora"}
FILES = {kind.__module__.rpartition(".")[2] for kind in METHODS.values()}
METHODS_OF_FILE = {
    file: {n for n, kind in METHODS.items() if kind.__module__.endswith(f".{file}")}
    for file in FILES
}
PARTS = ("fedraclora", "strategies", "clients", "conf", "pyproject.toml", "README.md", "LICENSE")
IMPORTED = """
import importlib, pkgutil, fedraclora
names = [m.name for m in pkgutil.walk_packages(fedraclora.__path__, "fedraclora.")]
for name in names:
    if not name.startswith("fedraclora.experiments") and not name.endswith("__main__"):
        importlib.import_module(name)
from fedraclora.strategies.methods import METHODS
print(sorted(METHODS))
"""


def imports(path: Path) -> Iterator[str]:
    """Files of methods that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, name = node.module.rpartition(".")
            if package == "fedraclora.strategies.methods":
                yield name


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_method_builds_on_none_but_those_that_stay(file: str) -> None:
    assert {*imports(ROOT / f"strategies/methods/{file}.py")} <= KEPT


# Tests that know single methods and have no file of their own for each: why.
TESTS = {
    "tests/campaigns/defects_methods.py": "a planted defect is one of a method",
    "tests/campaigns/defects_wire.py": "a planted defect is one of a method",
    "tests/contract/test_walking_rounds.py": "a family of three, against the same formulas",
    "tests/contract/worlds.py": "a second opinion of what clients of single methods hold",
    "tests/reference/client.py": "a second opinion of a local step",
    "tests/reference/galore.py": "a second opinion of a local step",
    "tests/reference/walking.py": "a second opinion of a local step",
}


def test_a_methods_tests_are_parameters_of_the_table_or_a_file_of_its_own() -> None:
    """``tests/methods/test_<file>.py``, or one in another folder whose name begins like that."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if any(not path.stem.startswith(f"test_{file}") for file in {*imports(path)} - KEPT):
            found.add(path.relative_to(ROOT).as_posix())
    assert found == TESTS.keys()


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is installed, without the other methods."""
    folder = tmp_path_factory.mktemp("rest")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "experiments")
            shutil.copytree(source, folder / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder / part)
    table = folder / "strategies/methods/__init__.py"
    text = table.read_text(encoding="utf-8")
    for file in FILES - KEPT:
        (folder / f"strategies/methods/{file}.py").unlink()
        kinds = {METHODS[name].__name__ for name in METHODS_OF_FILE[file]}
        text = re.sub(rf"^from \S+\.{file} import .*\n", "", text, flags=re.MULTILINE)
        text = re.sub(rf'^    "\w+": ({"|".join(kinds)}),\n', "", text, flags=re.MULTILINE)
        for name in METHODS_OF_FILE[file]:
            (folder / f"conf/method/{name}.yaml").unlink(missing_ok=True)
            for preset in (folder / "conf/experiment").glob("*.yaml"):
                if re.search(rf"/method: {name}$", preset.read_text(), flags=re.MULTILINE):
                    preset.unlink()
    table.write_text(text, encoding="utf-8")
    return folder


def done(folder: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    found = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-3000:]
    return found.stdout


@pytest.mark.long
def test_every_module_of_the_rest_is_imported(rest: Path) -> None:
    found = done(rest, "-c", IMPORTED)
    assert found.splitlines()[-1] == str(sorted(set().union(*(METHODS_OF_FILE[f] for f in KEPT))))


@pytest.mark.long
def test_the_rest_has_all_types(rest: Path) -> None:
    done(rest, "-m", "mypy", "--cache-dir", str(rest / "cache"))


@pytest.mark.long
@pytest.mark.parametrize("method", ["fedavg_lora", "ffa_lora"])
def test_the_rest_composes_and_runs(rest: Path, method: str) -> None:
    small = ["clients=4", "clients_per_round=2", "rounds=1", "pretrain=none", "data=digits"]
    command = ("-m", "fedraclora.commands.cli", "simulate", f"method={method}", *small)
    done(rest, *command, "--cfg", "job")
    done(rest, *command, f"output.dir={rest / method}")
