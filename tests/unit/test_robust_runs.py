"""Whole runs in which one client of five attacks."""

from __future__ import annotations

from functools import cache

import pytest

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.run.ledger import Row, number
from fedraclora.strategies.methods import METHODS
from tests.common import assemble

SMALL = [
    *("data=digits", "partition=iid", "pretrain=none", "model.hidden=[32]"),
    *(
        "clients=20",
        "clients_per_round=20",
        "rounds=25",
        "local.lr=1",
        "local.epochs=5",
        "evaluate.every=25",
    ),
]
FLIP = ("attack=sign_flip", "attack.scale=5")


@cache
def last_row(*words: str) -> Row:
    """The last row of a run."""
    run = assemble(from_plain(composed([*SMALL, *words]), METHODS), None)
    run.strategy.run(run.grid)
    return run.strategy.recorder.ledger.rows[-1]


@pytest.mark.slow
@pytest.mark.short(when=lambda rule: rule in {"median", "multi_krum"})  # by rows, by clients
@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "geometric_median", "multi_krum"])
def test_a_rule_keeps_the_accuracy_where_averaging_loses_it(rule: str) -> None:
    clean = number(last_row(), "metrics", "accuracy")
    averaged = number(last_row(*FLIP), "metrics", "accuracy")
    row = last_row(*FLIP, f"aggregator={rule}")
    assert row["attackers"] == 4
    assert clean > 0.9
    assert averaged < 0.5
    assert number(row, "metrics", "accuracy") > clean - 0.03


@pytest.mark.slow
def test_an_attack_does_not_depend_on_the_engine() -> None:
    words = (*FLIP, "aggregator=geometric_median", "rounds=2", "evaluate.every=1")
    losses = [number(last_row(*words, e), "metrics", "loss") for e in ("engine=inline", "seed=0")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
