"""A method goes with its file, its row and its YAML, and what is left is whole.

All go at once, and each by itself. Those stay on which others build and which shared tests take as
examples. Types are checked with all gone: no file of a method is imported by another, so the types
hold with fewer gone. The laboratory, `experiments`, compares methods and is left out, as it is of
the wheel.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from rest import LIBRARIES, tried

from fedraclora.strategies import methods

ROOT = Path(__file__).resolve().parents[2]
KEPT = {"fed_rac_lora", "fedavg", "fedavg_lora"}
PACKAGE = f"{methods.__name__}."  # a method of one's own has neither file nor YAML here
METHODS = {n: kind for n, kind in methods.METHODS.items() if kind.__module__.startswith(PACKAGE)}
FILES = {kind.__module__.rpartition(".")[2] for kind in METHODS.values()}
METHODS_OF_FILE = {
    file: {n for n, kind in METHODS.items() if kind.__module__.endswith(f".{file}")}
    for file in FILES
}
PARTS = ("fedraclora", "strategies", "clients", "conf", "pyproject.toml")


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


@pytest.mark.slow
def test_a_methods_tests_are_parameters_of_the_table_or_a_file_of_its_own() -> None:
    """``tests/methods/test_<file>.py``, or one in another folder whose name begins like that."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if any(not path.stem.startswith(f"test_{file}") for file in {*imports(path)} - KEPT):
            found.add(path.relative_to(ROOT).as_posix())
    assert found == TESTS.keys()


def copied(folder: Path) -> Path:
    """A copy of what is installed."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "experiments")
            shutil.copytree(source, folder / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder / part)
    return folder


def take_away(folder: Path, names: set[str]) -> None:
    """Take methods out of a copy: rows, YAML, presets, and files that no other row names."""
    table = folder / "strategies/methods/__init__.py"
    text = table.read_text(encoding="utf-8")
    for file, all_ in METHODS_OF_FILE.items():
        if all_ <= names:
            (folder / f"strategies/methods/{file}.py").unlink()
            text = re.sub(rf"^from \S+\.{file} import .*\n", "", text, flags=re.MULTILINE)
    for name in names:
        text = re.sub(rf'^    "{name}": \w+,\n', "", text, flags=re.MULTILINE)
        (folder / f"conf/method/{name}.yaml").unlink(missing_ok=True)
        for preset in (folder / "conf/experiment").glob("*.yaml"):
            if re.search(rf"/method: {name}$", preset.read_text(), flags=re.MULTILINE):
                preset.unlink()
    table.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without all methods of other files."""
    folder = copied(tmp_path_factory.mktemp("rest"))
    take_away(folder, set().union(*(METHODS_OF_FILE[file] for file in FILES - KEPT)))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy from which methods are taken and to which they return."""
    return copied(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def without(whole: Path, tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Give the copy without a method, until the end of a test."""
    parts = ("strategies/methods", "conf/method", "conf/experiment")
    for part in parts:
        shutil.copytree(whole / part, tmp_path / part)

    def give(name: str) -> Path:
        take_away(whole, {name})
        return whole

    yield give
    for part in parts:
        shutil.rmtree(whole / part)
        shutil.copytree(tmp_path / part, whole / part)


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Processes for one call each, with the libraries but without the project."""
    context = get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*METHODS} - KEPT))
def test_without_one_method_the_rest_is_imported_and_runs(
    method: str, without: Callable[[str], Path], processes: ProcessPoolExecutor
) -> None:
    other = "fedavg_lora" if METHODS[method] is METHODS["fed_rac_lora"] else "fed_rac_lora"
    left = processes.submit(tried, without(method), [other]).result()
    assert left == sorted({*METHODS} - {method})


@pytest.mark.long
def test_the_rest_is_imported_and_runs(rest: Path, processes: ProcessPoolExecutor) -> None:
    left = processes.submit(tried, rest, ["fedavg_lora", "ffa_lora"]).result()
    assert left == sorted(set().union(*(METHODS_OF_FILE[f] for f in KEPT)))


@pytest.mark.long
def test_the_rest_has_all_types(rest: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(rest / "cache")]
    environment = os.environ | {"PYTHONPATH": str(rest)}
    done = subprocess.run(
        command, cwd=rest, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
