"""The tutorials run from top to bottom, and print what stands below their programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.superlink import SuperLink

pytestmark = pytest.mark.slow

PAGES = Path(__file__).parents[2] / "docs" / "tutorials"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", re.DOTALL)
FILE = re.compile(r"```(?:python|toml)\n# (\S+)\n(.*?)```", re.DOTALL)
NUMBER = re.compile(r"-?\b\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def check_output(printed: str, said: str) -> None:
    """Hold an output to that of the page: the same words, and numbers that are near.

    Another processor rounds otherwise, which trainings of many steps make larger.
    """
    words, wanted = (
        re.sub(r"[\s-]+", " ", NUMBER.sub("#", text)).strip() for text in (printed, said)
    )
    assert words.endswith(wanted)
    found = [float(n.replace(",", "")) for n in NUMBER.findall(said)]
    numbers = [float(n.replace(",", "")) for n in NUMBER.findall(printed)][-len(found) :]
    assert numbers == pytest.approx(found, rel=0.03, abs=0.04)


def run_page(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the programs of a page one after another, in a folder with its files."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    text = (PAGES / name).read_text()
    for path, code in FILE.findall(text):
        (folder / path).write_text(code)
    names: dict[str, object] = {}
    for code, said in BLOCK.findall(text):
        if code.startswith("# "):
            continue
        capsys.readouterr()
        exec(compile(code, name, "exec"), names)
        if said:
            check_output(capsys.readouterr().out, said)


def test_a_method_of_ones_own_comes_to_a_table_and_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page("your-method.md", tmp_path, monkeypatch, capsys)
    assert (tmp_path / "paper.pdf").stat().st_size > 1000
    assert {"table.md", "table.csv", "compare.png", "report.html"} <= {
        file.name for file in (tmp_path / "runs" / "paper").iterdir()
    }


def test_the_method_of_the_tutorial_obeys_the_laws_and_its_mistake_does_not(
    tmp_path: Path,
) -> None:
    page = (PAGES / "your-method.md").read_text()
    code = dict(FILE.findall(page))["mine.py"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "Recycled"]
    root = PAGES.parents[1]
    env = os.environ | {"FEDRACLORA_METHOD": "mine:Recycled", "PYTHONPATH": f"{tmp_path}:{root}"}

    def tested(code: str) -> str:
        (tmp_path / "mine.py").write_text(code)
        place = "tests/contract/test_method_contract.py"
        done = subprocess.run(
            [*words, place], cwd=root, env=env, capture_output=True, text=True, check=False
        )
        return done.stdout

    assert re.search(r"\n\d+ passed, \d+ deselected", found := tested(code)), found
    broken = tested(code.replace('replies.mean("B")', "replies.B.mean(0)"))
    (said,) = re.findall(r"```text\nlaw of \w+\n(.*?)```", page, re.DOTALL)
    assert said in broken


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_loop_and_a_trainer_of_ones_own_train_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="a Trainer needs the extra trainers")
    run_page("trainer.md", tmp_path, monkeypatch, capsys)


def write_app(folder: Path) -> None:
    """Write the plain Flower app of the tutorial."""
    (folder / "digits").mkdir(parents=True)
    (folder / "digits" / "__init__.py").write_text("")
    for path, code in FILE.findall((PAGES / "flower-app.md").read_text()):
        (folder / path).write_text(f"# {path}\n{code}")  # as a reader copies it


def last_round(folder: Path, rate: float) -> tuple[float, str]:
    """Run an app with ten nodes, and give its accuracy after the last round, and its log."""
    config = folder.with_suffix(".toml")
    config.write_text(f"lr = {rate}\n")
    options: dict[str, str | int | float] = {
        "num-supernodes": 10,
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": 2,
    }
    quiet: dict[str, str | int | float] = {
        "init-args-logging-level": "ERROR",
        "init-args-log-to-driver": False,
    }
    with SuperLink(show=False) as link:
        ended = link.run_app(folder, config, {**options, **quiet})
    assert ended.word == "finished:completed", ended.log
    return float(re.findall(r"MetricRecord: \{.*'accuracy': ([\d.]+)", ended.log)[-1]), ended.log


def test_a_flower_app_sends_less_by_the_change_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (PAGES / "flower-app.md").read_text()
    write_app(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "low")
    (change,) = re.findall(r"```diff\n(.*?)```", page, re.DOTALL)
    subprocess.run(["git", "apply", "-"], input=change, text=True, cwd=tmp_path / "low", check=True)
    (rate,) = re.findall(r'--run-config "lr=([\d.]+)"', page)
    reached = re.search(r"^\| accuracy after 10 rounds \| (\S+) \| (\S+) \|", page, re.MULTILINE)
    assert reached is not None
    plain, low = map(float, reached.groups())
    assert last_round(tmp_path / "plain", 0.1)[0] == pytest.approx(plain, abs=0.03)
    found, log = last_round(tmp_path / "low", float(rate))
    assert found == pytest.approx(low, abs=0.03)
    assert re.findall(r"'\w+_bytes': [\d.]+", log)[-3:] == re.findall(r"'\w+_bytes': [\d.]+", page)
    capsys.readouterr()
    monkeypatch.syspath_prepend(str(tmp_path / "low"))
    monkeypatch.delitem(sys.modules, "digits", raising=False)
    exec(compile((tmp_path / "low" / "rates.py").read_text(), "rates.py", "exec"), {})
    (said,) = re.findall(r"# rates\.py\n.*?```text\n(.*?)```", page, re.DOTALL)
    check_output(capsys.readouterr().out, said)
