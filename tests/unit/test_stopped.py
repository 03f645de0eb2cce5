"""What a run leaves that stops before its end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedraclora.commands.deploy import Record
from fedraclora.config.titles import run_title
from fedraclora.errors import ClientError, DivergenceError
from fedraclora.protocol.uplinks import Refusal, failures_error
from fedraclora.run.stopped import STOPPED, divergence
from fedraclora.strategies import runner
from fedraclora.strategies.runner import stopping_noted
from fedraclora.strategies.server.callbacks import Callbacks

PLAIN = {
    "method": {"name": "fed_rac_lora", "rank": 8},
    "data": {"name": "mnist"},
    "partition": {"name": "dirichlet", "alpha": 0.1},
    "local": {"name": "sgd", "lr": 0.05},
    "engine": {"name": "vectorized"},
    "output": {"plots": True},
    "seed": 3,
    "rounds": 9,
}
ROWS = [{"round": t, "metrics": {"accuracy": t / 10}} for t in range(3)]


def assembled(rows: list[dict[str, object]]) -> Any:
    """As much of a run as its end needs."""
    recorder = SimpleNamespace(ledger=SimpleNamespace(rows=rows))
    output, local = SimpleNamespace(plots=True), SimpleNamespace(is_own=True)
    return SimpleNamespace(
        recorder=recorder,
        strategy=SimpleNamespace(done=len(rows) - 1, callbacks=Callbacks([])),
        config=SimpleNamespace(title=run_title(PLAIN), output=output, local=local, rounds=9),
        built=SimpleNamespace(classes=0),
    )


@pytest.mark.parametrize(
    ("error", "kind", "diverged"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (ClientError("round 3: no client replied in time"), "failed", None),
        (DivergenceError("round 3: their losses are nan"), "diverged", 3),
    ],
)
def test_a_run_that_stops_leaves_the_reason_and_its_curves(
    tmp_path: Path, error: BaseException, kind: str, diverged: int | None
) -> None:
    with pytest.raises(type(error)), stopping_noted(assembled(ROWS), tmp_path):
        raise error
    found = json.loads((tmp_path / STOPPED).read_text())
    assert (found["kind"], found["round"]) == (kind, 2)
    assert divergence(tmp_path) == diverged
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with stopping_noted(assembled(ROWS), tmp_path):
        assert not (tmp_path / STOPPED).exists()  # it goes on
    assert not (tmp_path / STOPPED).exists()


def test_a_run_that_stops_before_its_first_row_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ClientError), stopping_noted(assembled([]), tmp_path):
        raise ClientError("no SuperNode")
    assert not [*tmp_path.iterdir()]


def test_what_cannot_be_noted_does_not_hide_the_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "note_stop", full)
    with pytest.raises(ClientError, match="round 3"), stopping_noted(assembled(ROWS), tmp_path):
        raise ClientError("round 3")
    assert "why the run stopped" in caplog.text


def test_a_record_of_a_run_elsewhere_is_drawn_where_it_stops(tmp_path: Path) -> None:
    record = Record(tmp_path / "run", dict(PLAIN), resume=False)
    with record:
        record.take(dict(ROWS[0]))
    record.resume = True
    with pytest.raises(KeyboardInterrupt), record:
        raise KeyboardInterrupt
    assert (tmp_path / "run" / "curves.png").is_file()


def test_a_round_diverged_where_all_that_failed_have_numbers_that_are_not_finite() -> None:
    lost = Refusal(3, "its training loss is nan; lower local.lr or set local.clip")
    late = Refusal(4, "no reply in time")
    assert type(failures_error([lost, lost], 7, "max_failures=0")) is DivergenceError
    assert type(failures_error([lost, late], 7, "max_failures=0")) is ClientError


def test_the_title_names_data_division_step_size_and_seed() -> None:
    assert run_title(PLAIN) == "fed_rac_lora r=8 on mnist (dirichlet), sgd lr=0.05, seed 3"
    given = {**PLAIN, "partition": {"name": "given"}}
    assert run_title(given) == "fed_rac_lora r=8 on mnist, sgd lr=0.05, seed 3"
