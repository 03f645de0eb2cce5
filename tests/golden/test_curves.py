"""Short loss curves, one per method, in float64: a changed update rule cannot hide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import pytest

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.experiments.pages import aliases
from fedraclora.run.ledger import column
from fedraclora.strategies.methods import METHODS
from tests.common import assemble

GOLDEN = Path(__file__).parent
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
    "clients_per_round=5",
    "rounds=6",
    "head=lora",
    "local.lr=0.05",
    "local.batch_size=6",
    "output=study",
]


# AdamW tells apart what plain steps do not: it does not follow a turn of the basis (FedSVD).
LOCAL = {"": [], "adamw_": ["local.optimizer=adamw", "local.lr=0.02"]}


DISTINCT = [name for name in METHODS if name not in aliases()]


def curves_of(name: str, local: list[str], prefix: str) -> dict[str, list[float]]:
    """Run the job with a method: loss on the test samples, and the clients' own, by round."""
    wanted = {"rank": 3, "alpha": 4.0, "sparse_rounds": 3}
    fields = {f.name for f in dataclasses.fields(METHODS[name])}  # type: ignore[arg-type]
    extra = [f"method.{key}={value}" for key, value in wanted.items() if key in fields]
    extra += ["local.lr=0.005"] if "eps" in fields else []  # slopes grow with the weights
    plain = composed([*JOB, f"method={name}", *local, *extra])
    run = assemble(from_plain(plain, METHODS), None)
    run.strategy.run(run.grid)
    rows = run.strategy.recorder.ledger.rows
    loss = "personal_loss" if run.config.method.client_state else "loss"
    return {
        f"{prefix}test_loss": column(rows, "metrics", loss).tolist(),
        f"{prefix}train_loss": column(rows[1:], "train_loss").tolist(),
    }


@pytest.mark.parametrize("name", DISTINCT)
def test_the_loss_takes_the_known_course(
    name: str, golden: Callable[[str, Mapping[str, Sequence[float]]], None]
) -> None:
    curves: dict[str, list[float]] = {}
    for prefix, local in LOCAL.items():
        found = curves_of(name, local, prefix)
        assert found[f"{prefix}test_loss"][-1] < found[f"{prefix}test_loss"][0]
        curves |= found
    golden(f"curve_{name}", curves)


def test_no_two_methods_have_one_curve() -> None:
    curves = {name: (GOLDEN / f"curve_{name}.json").read_text() for name in DISTINCT}
    assert {p.stem for p in GOLDEN.glob("curve_*.json")} == {f"curve_{n}" for n in DISTINCT}
    shared = [pair for pair in combinations(DISTINCT, 2) if curves[pair[0]] == curves[pair[1]]]
    assert not shared, f"these cannot be told apart: {shared}"
