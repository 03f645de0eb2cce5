"""One's own table and one's own module: one file, five keys or fewer, at the first try.

The real command line runs, in a folder of the user's that Python knows nothing of.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
# As the installed script does, which has the working folder nowhere on its path.
PROGRAM = [sys.executable, "-P", "-c", "from fedraclora.commands.cli import main; main()"]

QUICK = ("rounds=40", "output.plots=false")  # the defaults, 150 and curves, take seconds more


BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TABLE = next(block for block in BLOCKS if "to_csv" in block)
MODULE = next(block for block in BLOCKS if "def samples" in block)


def command(beginning: str) -> list[str]:
    """The words of a command of the page."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"fedraclora {beginning}"))
    return line.partition("#")[0].split()[1:]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [*PROGRAM, *words],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FEDRACLORA_DATA": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def summary(folder: Path) -> dict[str, object]:
    (found,) = folder.glob("runs/*/*/summary.json")
    loaded: dict[str, object] = json.loads(found.read_text())
    return loaded


def test_a_table_of_ones_own_runs_at_the_first_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = command("simulate data=table")
    assert sum("=" in word for word in words) <= 5
    monkeypatch.chdir(tmp_path)
    exec(compile(TABLE, "data.md", "exec"), {})
    done = run(tmp_path, *words, *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(tmp_path)
    assert found["clients"] == 5
    assert found["metrics"]["accuracy"] > 0.9  # type: ignore[index]
    (split,) = re.findall(r"\d+ training samples of \d+ clients, \d+ test samples", PAGE)
    assert split in done.stdout + done.stderr  # what was held out is not known otherwise


def test_a_module_of_ones_own_runs_at_the_first_try(tmp_path: Path) -> None:
    words = command("simulate data=own")
    assert sum("=" in word for word in words) <= 5
    (tmp_path / "mine.py").write_text(MODULE)
    done = run(tmp_path, *words, *QUICK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path)["clients"] == 3
    assert summary(tmp_path)["metrics"]["accuracy"] > 0.7  # type: ignore[index]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("deploy nodes=3 data=own data.samples=mine:nothing", "has no nothing"),
        ("deploy nodes=3 data=own", "nodes on this machine"),
        ("deploy nodes=4 data=own data.samples=mine:samples", "client 3 .*0 targets"),
        ("deploy connection=far data=own data.samples=mine:samples clients=3", "Leave it out"),
    ],
)
@pytest.mark.long
def test_node_data_are_checked_before_anything_is_started(
    tmp_path: Path, words: str, said: str
) -> None:
    """It failed after the SuperLink and all nodes had been started, in a round."""
    text = (
        "import numpy as np\ndef samples(k): return np.ones((6, 2))[k * 2 :], np.arange(6)[k * 2 :]"
    )
    (tmp_path / "mine.py").write_text(text)
    done = run(tmp_path, *words.split(), "rounds=2")
    assert done.returncode == 1
    assert re.search(f"^error: .*{said}", done.stderr)
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


@pytest.mark.long
def test_the_working_folder_is_importable_where_clients_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    words = command("simulate data=own")
    done = run(tmp_path, *words, "engine=ray", "engine.workers=1", "rounds=1")
    assert done.returncode == 0, done.stdout + done.stderr
