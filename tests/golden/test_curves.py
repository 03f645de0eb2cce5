"""Short loss curves, one per method, in float64: a changed update rule cannot hide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.assemble import assemble
from fedraclora.config import from_plain
from fedraclora.ledger import column
from strategies import METHODS

CONF = Path(__file__).resolve().parents[2] / "conf"
JOB = [
    "data=least_squares",
    "data.dtype=float64",
    "data.clients=12",
    "data.features=9",
    "data.outputs=4",
    "model=mlp",
    "model.hidden=[7]",
    "partition=given",
    "pretrain=none",
    "clients=null",
    "cohort=5",
    "rounds=6",
    "head=adapt",
    "local.lr=0.05",
    "local.batch_size=6",
    "output=study",
]


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_takes_the_known_course(
    name: str, golden: Callable[[str, Mapping[str, Sequence[float]]], None]
) -> None:
    extra = [] if name == "fedavg" else ["method.rank=3", "method.alpha=4.0"]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*JOB, f"method={name}", *extra])
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    run = assemble(from_plain({str(k): v for k, v in plain.items()}, METHODS), None)
    run.strategy.start(run.grid)
    rows = run.strategy.book.ledger.rows
    curves = {
        "test_loss": column(rows, "metrics", "loss").tolist(),
        "train_loss": column(rows[1:], "train_loss").tolist(),
    }
    assert curves["test_loss"][-1] < curves["test_loss"][0]
    golden(f"curve_{name}", curves)
