"""Short loss curves, one per method, in float64: a changed update rule cannot hide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest

from experiments.assemble import assemble
from experiments.choices import composed
from fedraclora.config import from_plain
from fedraclora.ledger import column
from strategies import METHODS

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
    wanted = {"rank": 3, "alpha": 4.0, "sparse_rounds": 3}
    fields = {f.name for f in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
    extra = [f"method.{key}={value}" for key, value in wanted.items() if key in fields]
    plain = composed([*JOB, f"method={name}", *extra])
    run = assemble(from_plain(plain, METHODS), None)
    run.strategy.start(run.grid)
    rows = run.strategy.book.ledger.rows
    loss = "personal_loss" if run.config.method.traits.client_state else "loss"
    curves = {
        "test_loss": column(rows, "metrics", loss).tolist(),
        "train_loss": column(rows[1:], "train_loss").tolist(),
    }
    assert curves["test_loss"][-1] < curves["test_loss"][0]
    golden(f"curve_{name}", curves)
