"""Callbacks of a program's own: what they see, what they cannot change, and how they end a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

import fedraclora
from fedraclora.errors import ConfigError, DivergenceError
from fedraclora.run.stopped import stop_kind
from tests.common import FIXED

WORDS = (*FIXED, "data=digits", "pretrain=none", "output.progress=false")
SIZES: dict[str, Any] = {
    "model": {"hidden": [7]},
    "clients": 5,
    "clients_per_round": 3,
    "rounds": 4,
}


def run(*words: str, **keys: Any) -> fedraclora.RunResult:
    return fedraclora.simulate(*WORDS, *words, **(SIZES | keys))


class Everything(fedraclora.Callback):
    """Writes into all that it is given, and notes what it saw."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    @override
    def begin(self, run: Any) -> None:
        self.seen.append(("begin", run.done, run.config["rounds"]))
        run.config["rounds"] = 1

    @override
    def measure(self, weights: Any, round_: int) -> dict[str, object]:
        norm = sum(float(t.square().sum()) for t in weights.values()) ** 0.5
        for tensor in weights.values():
            tensor.zero_()
        return {"norm": norm}

    @override
    def row(self, row: Any) -> None:
        self.seen.append(("row", row["round"], row["norm"]))
        row["metrics"]["accuracy"] = 1.0
        row.clear()

    @override
    def ends(self, rows: Any) -> bool:
        self.seen.append(("ends", len(rows)))
        rows[-1]["uplink_total"] = 0
        return False

    @override
    def end(self, summary: Any, *, failed: bool) -> None:
        self.seen.append(("end", failed, summary["rounds"]))
        summary.clear()


def test_a_callback_sees_everything_and_changes_nothing() -> None:
    watching, plain = Everything(), run()
    found = run(callbacks=[watching])
    assert found.summary["weights_digest"] == plain.summary["weights_digest"]
    norms = [row.pop("norm") for row in found.rows]
    assert [
        {**row, "seconds": 0, "cpu_seconds": 0, "peak_memory_bytes": 0} for row in found.rows
    ] == [{**row, "seconds": 0, "cpu_seconds": 0, "peak_memory_bytes": 0} for row in plain.rows]
    rows = [("row", t, norm) for t, norm in enumerate(norms)]
    asked = [("ends", t) for t in range(1, 5)]
    between = [step for pair in zip(asked, rows[1:], strict=True) for step in pair]
    assert watching.seen == [("begin", 0, 4), rows[0], *between, ("end", False, 4)]


class Plain(fedraclora.Callback):
    """Its hooks are functions, not methods."""

    @staticmethod
    def row(row: Any) -> None:  # type: ignore[override]
        row["metrics"].clear()

    @staticmethod
    def measure(weights: Any, round_: int) -> dict[str, object]:  # type: ignore[override]
        return {"left": sum(int(t.zero_().count_nonzero()) for t in weights.values())}


def test_a_hook_of_any_kind_gets_copies() -> None:
    found = run(callbacks=[Plain()])
    assert [row["left"] for row in found.rows] == [0] * 5
    assert found.summary["weights_digest"] == run().summary["weights_digest"]
    assert found.rows[-1]["metrics"] == run().rows[-1]["metrics"]


class AtRound(fedraclora.Callback):
    def __init__(self, round_: int) -> None:
        self.round = round_

    @override
    def ends(self, rows: Any) -> bool:
        return len(rows) > self.round


@pytest.mark.slow
def test_a_callback_ends_a_run_and_a_run_that_goes_on_ends_there_too(tmp_path: Path) -> None:
    found = run(callbacks=AtRound(2))
    assert (found.summary["rounds"], found.summary["stopped"]) == (2, True)

    def stop(row: Any) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("output.checkpoint_every=1", folder=tmp_path, callbacks=[AtRound(2), stop])
    again = run(
        "output.checkpoint_every=1", folder=tmp_path, resume=True, callbacks=[AtRound(2), print]
    )
    assert again.summary["rounds"] == 2
    assert again.summary["weights_digest"] == found.summary["weights_digest"]
    read = run(folder=tmp_path, resume=True)
    assert read.summary["seconds"] == again.summary["seconds"], "it is at its end"


def test_a_function_that_returns_something_is_refused_for_it_would_end_nothing() -> None:
    def early(row: Any) -> bool:
        return bool(row["metrics"] == {})

    with pytest.raises(ConfigError, match=r"early .*returns False.*ends\(rows\)"):
        run(callbacks=[early])


def test_a_round_that_is_not_measured_has_no_metrics_in_its_row() -> None:
    seen: list[Any] = []
    run("evaluate.every=2", callbacks=[seen.append])
    assert [row["metrics"] == {} for row in seen] == [False, True, False, True, False]


class Raising(fedraclora.Callback):
    def __init__(self, hook: str, at: int) -> None:
        self.hook, self.at = hook, at

    @override
    def measure(self, weights: Any, round_: int) -> dict[str, object]:
        return self.fail("measure", round_)

    @override
    def row(self, row: Any) -> None:
        self.fail("row", row["round"])

    @override
    def ends(self, rows: Any) -> bool:
        return bool(self.fail("ends", len(rows)))

    def fail(self, hook: str, at: int) -> dict[str, object]:
        if (hook, at) == (self.hook, self.at):
            raise ZeroDivisionError("mine")
        return {}


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["measure", "row", "ends"])
def test_a_callback_that_raises_is_named_and_the_run_goes_on(hook: str, tmp_path: Path) -> None:
    failing, wanted = Raising(hook, 3), run()
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        run(folder=tmp_path, callbacks=[failing])
    told = " ".join(caught.value.__notes__)
    assert f"{hook} of Raising" in told
    assert "in round 3" in told
    found = run(folder=tmp_path, resume=True)
    assert found.summary["ledger_digest"] == wanted.summary["ledger_digest"]
    assert found.summary["weights_digest"] == wanted.summary["weights_digest"]


class Columns(fedraclora.Callback):
    def __init__(self, columns: Any) -> None:
        self.columns = columns

    @override
    def measure(self, weights: Any, round_: int) -> Any:
        return self.columns


@pytest.mark.parametrize("columns", [{"train_loss": 0.0}, {"round": 7}, {"metrics": {}}, 5])
def test_a_callback_takes_no_column_of_the_runs_own(columns: Any) -> None:
    with pytest.raises(ConfigError, match="Columns"):
        run(callbacks=[Columns(columns)])


def test_a_callback_may_read_why_a_run_failed(tmp_path: Path) -> None:
    class Reads(fedraclora.Callback):
        kinds: list[str | None] = []  # noqa: RUF012  of the one run of this test

        @override
        def end(self, summary: Any, *, failed: bool) -> None:
            self.kinds.append(stop_kind(tmp_path / "run"))

    with pytest.raises(DivergenceError):
        run("local.lr=1e30", f"output.dir={tmp_path / 'run'}", callbacks=[Reads()])
    assert Reads.kinds == ["diverged"]
