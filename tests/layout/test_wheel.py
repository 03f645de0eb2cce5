"""What a wheel holds: the code, what commands read when they run, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedraclora.commands import app
from fedraclora.commands.init import command as init
from fedraclora.run import folder as runfolder

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fedraclora", "strategies", "clients", "conf")
NOT_OF_THE_APP = ("commands", "compose", "conf", "launch.py", "terminal", "tuning")
KINDS = {".css", ".j2", ".js", ".py", ".tmpl", ".toml", ".txt", ".typed", ".yaml"}
EMPTY_COMMIT = ["commit", "-q", "--allow-empty", "-m", "a"]
MOST = 4_000_000  # bytes of all files: code and settings, and no results


@pytest.fixture(scope="module")
def wheel() -> Mapping[str, Path]:
    """The files of the wheel by their path in it, as the build of one would choose them."""
    wheels = pytest.importorskip("hatchling.builders.wheel")
    builder = wheels.WheelBuilder(str(ROOT))
    return {f.distribution_path: Path(f.path) for f in builder.recurse_included_files()}


def test_it_holds_code_and_settings_and_no_results(wheel: Mapping[str, Path]) -> None:
    assert {Path(name).suffix for name in wheel} == KINDS
    assert not [name for name in wheel if name.startswith("fedraclora/experiments/")]
    assert {Path(name).parts[0] for name in wheel} == {"fedraclora"}
    assert sum(path.stat().st_size for path in wheel.values()) < MOST


def test_it_holds_all_code_and_all_that_is_read(wheel: Mapping[str, Path]) -> None:
    read = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    for kind in ("py.typed", "*.j2", "*.tmpl", "usage.txt", "*.yaml"):
        read += [path for name in PACKAGES for path in (ROOT / name).rglob(kind)]
    folders = (init.TEMPLATES, init.EXAMPLES)
    templates = {path.resolve() for of in folders for path in of.rglob("*") if path.is_file()}
    assert templates <= {*read}
    names = {path.relative_to(ROOT).as_posix().removeprefix("fedraclora/") for path in read}
    assert {f"fedraclora/{name}" for name in names} <= wheel.keys()


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_is_the_same(
    wheel: Mapping[str, Path], tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(path for path in tmp_path.iterdir() if path.is_dir())
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as made:
        found = {n: made.read(n) for n in made.namelist() if ".dist-info/" not in n}
    assert found == {name: path.read_bytes() for name, path in wheel.items()}


def test_a_flower_app_is_made_of_it(
    wheel: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is installed, beside what others have installed."""
    site = tmp_path / "site"
    for name, path in wheel.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(path.read_bytes())
    (site / "pyproject.toml").write_text("# of another package, which should not have brought it\n")
    monkeypatch.setattr(app, "CODE", site / "fedraclora")
    monkeypatch.setattr(app, "PROJECT", site / "fedraclora" / "commands" / "app.toml")
    app.copy_app(tmp_path / "app")
    code = {name for name in wheel if name.endswith((".py", ".yaml"))}
    wanted = {name for name in code if Path(name).parts[1] not in NOT_OF_THE_APP}
    made = [path for path in (tmp_path / "app").rglob("*") if path.is_file()]
    assert {p.relative_to(tmp_path / "app").as_posix() for p in made} == {*wanted, "pyproject.toml"}
    assert (tmp_path / "app/pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()


def test_installed_code_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the project in whose folder the environment lies."""
    site = tmp_path / "project" / ".venv" / "fedraclora"
    site.mkdir(parents=True)
    for words in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a", *EMPTY_COMMIT]):
        subprocess.run(["git", "-C", str(tmp_path / "project"), *words], check=True)
    monkeypatch.setattr(runfolder, "__file__", str(site / "runfolder.py"))
    assert runfolder.git_revision.__wrapped__() is None


def test_a_machine_without_git_has_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runfolder.git_revision.__wrapped__() is None
