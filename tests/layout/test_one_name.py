"""A user's own folders may be called as ours are: only ``fedraclora`` is ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedraclora

pytestmark = pytest.mark.slow

OURS = ("strategies", "clients", "experiments", "conf")
DATA = """
import numpy as np

def owner(client):
    draw = np.random.default_rng(client)
    x = draw.normal(size=(8 + client, 5)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)

def held_out():
    return owner(9)
"""
MODEL = """
import torch
import conf, strategies  # the user's, as this is

def network(shape=(5,), classes=2):
    assert conf.MINE and strategies.MINE
    torch.manual_seed(conf.MINE)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
"""
SCRIPT = """
import conf, clients, experiments, strategies
import fedraclora
from clients.model import network
from experiments.data import held_out, owner

if __name__ == "__main__":
    test = held_out()
    run = fedraclora.simulate(
        model=network(), data=[owner(k) for k in range(3)], test=test, rounds=1, engine="ENGINE"
    )
    assert [m.MINE for m in (conf, clients, experiments, strategies)] == [1] * 4
    print(len(run.rows), "rows")
"""
WORDS = [
    "data=own",
    "data.test_function=experiments.data:held_out",
    "data.classes=2",
    "data.shape=[5]",
    "model=function",
    "model.function=clients.model:network",
    "clients=3",
    "clients_per_round=3",
    "rounds=2",
    "pretrain=none",
    "output=study",
]
OWNER = "experiments.data:owner"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in OURS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = 1\n")
    (tmp_path / "experiments/data.py").write_text(DATA)
    (tmp_path / "clients/model.py").write_text(MODEL)
    return tmp_path


def ran(folder: Path, *words: str) -> str:
    """Run Python in the folder, with ``fedraclora`` found where this process finds it."""
    core = folder / "core"
    core.mkdir(exist_ok=True)
    if not (core / "fedraclora").exists():
        (core / "fedraclora").symlink_to(Path(fedraclora.__file__).parent)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(core)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def digest(folder: Path, command: str, *words: str) -> str:
    ran(folder, "-m", "fedraclora.commands.cli", command, *WORDS, *words, "output.dir=run")
    return str(json.loads((folder / "run/summary.json").read_text())["weights_digest"])


def test_a_script_beside_them(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT.replace("ENGINE", "vectorized"))
    assert "2 rows" in ran(folder, "script.py")


def test_a_command_beside_them(folder: Path) -> None:
    assert digest(folder, "simulate", f"data.samples={OWNER}", "engine=inline")


@pytest.mark.long
def test_a_script_on_ray_beside_them(folder: Path) -> None:
    (folder / "script.py").write_text(SCRIPT.replace("ENGINE", "ray"))
    assert "2 rows" in ran(folder, "script.py")


@pytest.mark.long
def test_the_same_on_ray_and_on_nodes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = digest(folder, "simulate", f"data.samples={OWNER}", "engine=inline")
    (folder / "run").rename(folder / "inline")
    words = (f"data.samples={OWNER}", "engine=ray", "engine.workers=2")
    assert digest(folder, "simulate", *words) == plain
    (folder / "run").rename(folder / "ray")
    assert digest(folder, "deploy", "nodes=3", f"data.samples={OWNER}") == plain
