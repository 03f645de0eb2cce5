"""The same code on a GPU: close to the CPU, and the same bits after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.assemble import Assembled, assemble
from experiments.choices import composed
from fedraclora.config import from_plain
from fedraclora.tree import digest
from strategies import METHODS

pytestmark = pytest.mark.gpu
JOB = [
    "data=digits",
    "pretrain=none",
    "clients=12",
    "cohort=6",
    "rounds=4",
    "local.lr=0.1",
    "output=study",
    "output.checkpoint_every=2",
]


def job(*words: str, folder: Path | None = None, resume: bool = False) -> Assembled:
    config = from_plain(composed([*JOB, *words]), METHODS)
    return assemble(config, folder, resume=resume)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("method", METHODS)
def test_the_gpu_agrees_with_the_cpu(method: str, model: str) -> None:
    runs = [job(f"method={method}", f"model={model}", f"device={d}") for d in ("cpu", "cuda")]
    for run in runs:
        run.strategy.start(run.grid)
    left, right = (
        run.strategy.method.weights(run.strategy.state, run.strategy.draw) for run in runs
    )
    for name, value in left.items():
        torch.testing.assert_close(right[name].cpu(), value, rtol=1e-3, atol=1e-3)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = job("device=cuda", folder=tmp_path / "whole")
    whole.strategy.start(whole.grid)
    part = job("device=cuda", folder=tmp_path / "part")
    part.strategy.start(part.grid, num_rounds=2)
    rest = job("device=cuda", folder=tmp_path / "part", resume=True)
    rest.strategy.start(rest.grid)
    assert digest(rest.strategy.state.base) == digest(whole.strategy.state.base)
