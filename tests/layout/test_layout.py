"""What the tree itself must hold, whatever the code does."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedraclora", "strategies", "clients", "experiments", "conf")
# Written in two halves, so that this file does not hold what it forbids.
FORBIDDEN = (
    r"(?<![\w.$}/-])/(?:work|root|home)" + "/",
    "pypi" + r"\.org",
    "files" + r"\.pythonhosted",
    "download" + r"\.pytorch",
)


def modules(*packages: str) -> list[Path]:
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def own_files() -> list[Path]:
    """Files that are tracked, or would be: what a clone holds."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the project's")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


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
