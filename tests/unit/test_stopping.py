"""Early stopping: when it is due, what is reported, and that a resumed run stops where it would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedraclora.compose.choices import section_keys
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import digested, from_plain
from fedraclora.config.settings import StopConfig
from fedraclora.errors import ConfigError
from fedraclora.run.ledger import Row, read_ledger
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.server.callbacks import Stopping
from tests.common import simulated

JOB = [
    "data=digits",
    "pretrain=none",
    "model.hidden=[6]",
    "method.rank=2",
    "clients=4",
    "clients_per_round=4",
    "partition=iid",
    "output.progress=false",
    "output.plots=false",
    "output.checkpoint_every=2",
    "data.validation=0.2",
    "local.lr=2.0",  # too large: the validation loss soon stops to fall
    "rounds=40",
    "stop.patience=3",
]


def rows(*values: float | None, metric: str = "loss") -> list[Row]:
    """A ledger; None: a round that was not measured."""
    return [
        {"round": t} | ({} if v is None else {"validation": {metric: v}})
        for t, v in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "due", "best"),
    [
        ([3.0], False, 0),
        ([3.0, 2.0, 1.0, 0.5], False, 3),
        ([1.0, 2.0], False, 0),
        ([1.0, 2.0, 2.0], True, 0),
        ([1.0, 2.0, 0.5, 0.6], False, 2),
        ([1.0, 2.0, 0.5, 0.6, 0.5], True, 2),  # an equal value is no improvement
        ([1.0, None, 2.0, None, 3.0], True, 0),  # evaluations count, not rounds
        ([1.0, None, 2.0, None, None], False, 0),
        ([1.0, float("nan"), float("nan")], True, 0),
    ],
)
def test_a_run_stops_after_so_many_evaluations_without_improvement(
    values: list[float | None], due: bool, best: int
) -> None:
    stop = Stopping(StopConfig(patience=2))
    found = stop.best(rows(*values))
    assert found is not None
    assert (stop.ends(rows(*values)), found["round"]) == (due, best)


@pytest.mark.parametrize(
    ("values", "due"),
    [
        ([1.0, 0.95, 0.89], False),  # in two steps, but by more than 0.1 in all
        ([1.0, 0.95, 0.9], True),  # by no more than 0.1
        ([1.0, 0.8, 0.75, 0.71], True),  # of the last improvement, not of the first value
        ([1.0, 0.8, 0.75, 0.69], False),
    ],
)
def test_what_is_no_larger_than_min_delta_is_no_improvement(values: list[float], due: bool) -> None:
    assert Stopping(StopConfig(patience=2, min_delta=0.1)).ends(rows(*values)) is due
    rising = Stopping(StopConfig("accuracy", 2, 0.1))
    assert rising.ends(rows(*(2 - value for value in values), metric="accuracy")) is due
    assert not Stopping(StopConfig(patience=2)).ends(rows(*values))


def test_min_delta_is_a_key(tmp_path: Path) -> None:
    patient, plain = (composed([*JOB, f"stop.min_delta={least}"]) for least in (0.1, 0))
    assert digested(patient, METHODS) != digested(plain, METHODS)
    assert "min_delta" in section_keys("stop")
    with pytest.raises(ConfigError, match=r"stop\.min_delta=-1\.0: expected .*0"):
        StopConfig(min_delta=-1.0)
    with pytest.raises(ConfigError, match=r"stop\.min_delta.*stop\.patience"):
        simulated(composed([*JOB, "stop.patience=null", "stop.min_delta=0.1"]), tmp_path / "run")


def test_a_metric_may_be_one_that_should_rise() -> None:
    stop = StopConfig("accuracy", 2)
    assert not Stopping(stop).ends(rows(0.5, 0.6, 0.7, metric="accuracy"))
    assert Stopping(stop).ends(rows(0.7, 0.6, 0.7, metric="accuracy"))


def test_each_row_is_asked_for_once() -> None:
    """A ledger reads rows from its file; a run of many rounds would read all of it each round."""
    asked = 0

    class Counting(list[Row]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal asked
            found = super().__getitem__(index)
            asked += len(found) if isinstance(index, slice) else 1
            return found

    stop, known = Stopping(StopConfig(patience=9)), rows(*(1.0 - k / 100 for k in range(50)))
    assert not any(stop.ends(Counting(known[:k])) for k in range(1, 51))
    assert asked == 50


def test_without_patience_nothing_is_measured_and_nothing_stops() -> None:
    stop = Stopping(StopConfig(), lambda weights: {"loss": 1.0})
    assert stop.measure({"w": torch.ones(1)}, 1) == {}
    assert not stop.ends(rows(1.0, 2.0, 3.0))
    assert not Stopping(StopConfig(patience=1)).ends([{"round": 0}])


def test_what_cannot_stop_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop\.patience=0: expected 1"):
        StopConfig(patience=0)
    misspelt = composed([*JOB, "stop.metric=accurcy"])  # the data may have metrics of their own
    with pytest.raises(ConfigError, match=r"stop\.metric 'accurcy'.*'accuracy'"):
        from_plain(misspelt, METHODS)
    stop = Stopping(StopConfig("f1", 1), lambda weights: {"accuracy": 0.5})
    with pytest.raises(ConfigError, match=r"stop.metric 'f1'. There are: accuracy"):
        stop.measure({}, 1)
    with pytest.raises(ConfigError, match=r"data\.validation=0.*above 0"):
        simulated(composed([*JOB, "data.validation=0.0"]), tmp_path / "run")


def run(folder: Path, *words: str, resume: bool = False) -> dict[str, Any]:
    summary = simulated(composed([*JOB, *words]), folder, resume=resume)
    found: dict[str, Any] = json.loads(json.dumps(summary, default=str))
    return found


def test_the_summary_names_the_best_round_and_the_last(tmp_path: Path) -> None:
    found = run(tmp_path / "run")
    ledger = read_ledger(tmp_path / "run" / "ledger.jsonl")
    losses = [row["validation"]["loss"] for row in ledger]  # type: ignore[index]
    best = losses.index(min(losses))
    assert 0 < best < 30
    assert found["stopped"] is True
    assert found["rounds"] == len(ledger) - 1 == best + 3
    assert found["best"]["round"] == best
    assert found["best"]["validation"]["loss"] == losses[best]
    assert found["best"]["metrics"] == ledger[best]["metrics"]
    assert found["metrics"] == ledger[-1]["metrics"]


def test_a_run_that_is_not_stopped_says_so(tmp_path: Path) -> None:
    found = run(tmp_path / "run", "rounds=2")
    assert (found["stopped"], found["rounds"]) == (False, 2)
    assert "best" not in run(tmp_path / "none", "rounds=2", "stop.patience=null")
