"""What the tree itself must hold, whatever the code does."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedraclora", "strategies", "clients", "experiments", "conf")
DOCUMENTED = ("fedraclora", "strategies", "clients")
TARGETS = (
    "help",
    "install",
    "simulate",
    "test",
    "test-all",
    "lint",
    "fmt",
    "conf",
    "docs",
    "golden",
    "bench",
    "bench-peers",
    "clean",
)
# Written in two halves, so that this file does not hold what it forbids.
FORBIDDEN = (
    r"(?<![\w.$}/-])/(?:work|root|home)" + "/",
    "pypi" + r"\.org",
    "files" + r"\.pythonhosted",
    "download" + r"\.pytorch",
)

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def modules(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def own_files() -> list[Path]:
    """Files that are tracked, or would be: what a clone holds."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the project's")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def make(*arguments: str) -> str:
    # Under `make test` the outer make hands its own flags down; this is another make.
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    done = subprocess.run(
        ["make", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, env=environment
    )
    return done.stdout


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public functions, classes and methods without a docstring, and the module itself."""
    if ast.get_docstring(tree) is None:
        yield "the module"
    inherited = {"override", "overload"}
    places: list[tuple[str, ast.Module | ast.ClassDef]] = [("", tree)]
    while places:
        prefix, place = places.pop()
        for node in place.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            marks = {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}
            if node.name.startswith("_") or marks & (inherited | {"setter"}):
                continue
            if ast.get_docstring(node) is None:
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                places.append((f"{prefix}{node.name}.", node))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_resolve_inside_this_checkout(package: str) -> None:
    name = package if package == "fedraclora" else f"fedraclora.{package}"
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not importable: run `make install`"
    assert spec.origin is not None, f"{name} has no __init__.py"
    assert Path(spec.origin).resolve().parent == ROOT / package, (
        f"{name} comes from {spec.origin}: another project of that name is installed"
    )


def test_code_names_packages_by_one_name() -> None:
    """By another it would be loaded a second time, and hide what a user has of that name."""
    bare = re.compile(
        r"^\s*(?:from|import) (?:strategies|clients|experiments|conf)\b", re.MULTILINE
    )
    paths = [*modules(*PACKAGES), *(ROOT / "tests").rglob("*.py")]
    assert [p for p in paths if bare.search(p.read_text()) and p.name != "test_one_name.py"] == []


def test_the_package_is_typed() -> None:
    assert (ROOT / "fedraclora" / "py.typed").is_file()


def test_public_names_are_documented() -> None:
    missing = {
        str(path.relative_to(ROOT)): names
        for path in modules(*DOCUMENTED)
        if (names := list(undocumented(ast.parse(path.read_text()))))
    }
    assert not missing


def test_undocumented_names_are_seen() -> None:
    source = '"""M."""\ndef _f(): ...\ndef g(): ...\nclass C:\n  """C."""\n  def h(self): ...\n'
    assert list(undocumented(ast.parse(source))) == ["g", "C.h"]


def test_config_files_say_in_one_line_what_they_choose() -> None:
    silent = []
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        # Hydra's own header (`# @package ...`) has to come first where there is one.
        lines = [line for line in path.read_text().splitlines() if not line.startswith("# @")]
        if not re.match(r"# ?\w", "".join(lines[:1])):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent, f"the first line must be a comment that says what the choice is: {silent}"


def test_files_name_no_machine_and_no_registry() -> None:
    found = []
    for path in own_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [
            f"{path.relative_to(ROOT)}: {match.group(0)}"
            for pattern in FORBIDDEN
            for match in re.finditer(pattern, text)
        ]
    assert not found


@pytest.mark.parametrize(
    "line", ["cd /wor" + "k/main", '"/roo' + 't/x"', "https://pyp" + "i.org/x"]
)
def test_machine_paths_and_registries_are_seen(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN)


@needs_make
def test_make_lists_its_targets() -> None:
    listed = re.findall(r"^  make (\S+) +\S", make("help"), flags=re.MULTILINE)
    assert listed == list(TARGETS)
    assert make() == make("help")


@needs_make
def test_the_test_target_checks_style_types_imports_and_runs_the_tests() -> None:
    recipe = make("--dry-run", "test")
    steps = ["ruff check", "ruff format --check", "lint-imports", "mypy", "-m pytest"]
    places = [recipe.find(step) for step in steps]
    assert -1 not in places, f"missing from `make test`: {steps[places.index(-1)]}"
    assert places == sorted(places)


@needs_make
def test_a_run_installs_no_tools() -> None:
    """In a clone without a virtual environment; the tools come on top of what a run needs."""
    run, tools = (
        make("--dry-run", name, "VENV=none").splitlines() for name in ("simulate", "tests")
    )
    runtime = next(line for line in run if line.endswith("--editable ."))
    assert runtime in tools
    assert runtime.replace("--editable .", "--editable '.[dev]'") in tools
    assert not [line for line in run if "[dev]" in line]


def test_ci_runs_the_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


def test_every_decision_record_is_in_the_index() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    records = sorted(p.name for p in (ROOT / "docs" / "adr").glob("*.md") if p.name != "README.md")
    assert records
    assert [name for name in records if f"({name})" not in index] == []
    numbers = [int(name[:4]) for name in records]
    assert numbers == list(range(1, len(numbers) + 1))
