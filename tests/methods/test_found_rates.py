"""Every method learns with its defaults alone: its learning rate is found (``local.lr=auto``)."""

from __future__ import annotations

import math

import pytest

import fedraclora
from fedraclora.compose import CONF
from fedraclora.run.ledger import headline, number

CHOICES = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
TASK = ("data=digits", "model.hidden=[12]", "clients=8", "clients_per_round=4", "pretrain=none")
QUIET = ("rounds=40", "evaluate.every=40", "output.progress=false")


@pytest.mark.slow  # half a minute in all
@pytest.mark.parametrize("name", CHOICES)
def test_a_method_learns_without_a_number_from_the_user(name: str) -> None:
    run = fedraclora.simulate(*TASK, *QUIET, f"method={name}")
    assert all(math.isfinite(number(row, "train_loss")) for row in run.rows[1:])
    metric = headline(run.rows)
    assert metric is not None
    before, after = (number(run.rows[at], "metrics", metric) for at in (0, -1))
    assert after > before
