"""Steps of a program's own: one class, in any engine, and what is refused of one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

import fedraclora
from fedraclora.aggregation.base import rows_of, starts
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.strategies import steps

QUIET = ("data=digits", "pretrain=none", "output.progress=false", "local.lr=0.5")
WORDS = (*QUIET, "output.checkpoint_every=1")
SIZES: dict[str, Any] = {
    "model": {"hidden": [7]},
    "clients": 5,
    "clients_per_round": 3,
    "rounds": 3,
}


def run(*words: str, **keys: Any) -> fedraclora.RunResult:
    given = WORDS if "folder" in keys else QUIET
    return fedraclora.simulate(*given, *words, **(SIZES | keys))


class Cosine(fedraclora.RoundStep):
    """Logs the mean cosine between the updates of two clients."""

    individuals = True
    first = True

    def __init__(self, name: str = "cosine") -> None:
        self.column, self.name, self.cosine = name, name, math.nan

    @override
    def treat(self, uplinks: Any, context: Any) -> Any:
        units = torch.nn.functional.normalize(rows_of(uplinks) - starts(context, uplinks), dim=1)
        self.cosine = float((units @ units.mT).triu(1).sum() / math.comb(len(units), 2))
        return uplinks

    @override
    def columns(self, exchange: Any, uplinks: Any) -> dict[str, object]:
        return {self.column: self.cosine}


def cosines(found: fedraclora.RunResult) -> list[Any]:
    return [row["cosine"] for row in found.rows[1:]]


def test_a_step_that_logs_the_cosine_between_updates_is_one_class() -> None:
    plain, found = run(), run(steps=[Cosine()])
    assert all(-1 < value < 1 for value in cosines(found))
    assert len(set(cosines(found))) == 3
    assert found.summary["weights_digest"] == plain.summary["weights_digest"]
    assert list(found.rows[1]) == [*list(plain.rows[1])[:-4], "cosine", *list(plain.rows[1])[-4:]]


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.long)])
def test_its_column_is_the_same_in_every_engine(engine: str) -> None:
    chunked = {"name": engine, "workers": 2, "chunk": 3} if engine == "ray" else engine
    assert cosines(run(steps=[Cosine()], engine=chunked)) == pytest.approx(
        cosines(run(steps=[Cosine()])), rel=0 if engine == "ray" else 1e-5
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"secure": "secagg", "aggregation_weights": "uniform"}, "secure=secagg .*Cosine"),
        (
            {"privacy": "client_level", "aggregation_weights": "uniform"},
            "privacy=client_level .*Cosine",
        ),
    ],
)
def test_a_step_that_looks_at_single_updates_is_refused_as_one_of_the_project_is(
    keys: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        run(steps=[Cosine()], **keys)


def test_so_is_one_of_the_project_that_a_key_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before round 1, by its class attribute alone: nothing else says so."""
    row = ("max_failures", lambda allowed: Cosine() if allowed else None)
    monkeypatch.setattr(steps, "STEPS", (row, *steps.STEPS))
    chosen: dict[str, Any] = {"max_failures": 1, "aggregation_weights": "uniform"}
    assert len(cosines(run(**chosen))) == 3
    for key, choice in (("secure", "secagg"), ("privacy", "client_level")):
        with pytest.raises(ConfigError, match=rf"{key}={choice} .*Cosine"):
            run(**chosen, **{key: choice})


def test_a_step_says_itself_what_it_does_not_go_with() -> None:
    @fedraclora.Feature(
        "a picky step",
        instead="steps without it",
        avoids={"control_variates=true": "it has seen enough"},
    )
    class Picky(Cosine):
        pass

    run(steps=[Picky()])
    with pytest.raises(
        ConfigError, match=r"picky step .* control_variates=true: .*enough.*without it"
    ):
        run(steps=[Picky()], control_variates=True, local={"steps": 2})

    @fedraclora.Feature("a wrong step", avoids={"control_variates=on": "it is no feature"})
    class Wrong(Cosine):
        pass

    with pytest.raises(ConfigError, match=r"a wrong step 'control_variates=on'.*=true"):
        run(steps=[Wrong()])


class Raises(Cosine):
    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook, self.calls = hook, 0

    def _fail(self, hook: str, round_: int) -> None:
        if hook == self.hook and round_ == 2:
            raise ZeroDivisionError("mine")

    @override
    def treat(self, uplinks: Any, context: Any) -> Any:
        self._fail("treat", context.round_)
        return super().treat(uplinks, context)

    @override
    def columns(self, exchange: Any, uplinks: Any) -> dict[str, object]:
        self._fail("columns", exchange.round_)
        return super().columns(exchange, uplinks)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["treat", "columns"])
def test_a_step_that_raises_is_named_and_nothing_is_lost(hook: str, tmp_path: Path) -> None:
    wanted, raising = run(steps=[Cosine()]), Raises(hook)
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        run(folder=tmp_path, steps=[raising])
    told = " ".join(caught.value.__notes__)
    assert f"{hook} of the step Raises" in told
    assert "in round 2" in told
    assert [row["round"] for row in fedraclora.read_run(tmp_path).rows] == [0, 1]
    raising.hook = "none"
    with pytest.raises(CheckpointError, match="steps"):
        run(folder=tmp_path, resume=True, steps=[raising])
    raising.hook = hook
    with pytest.raises(ZeroDivisionError):
        run(folder=tmp_path, resume=True, steps=[raising])
    assert wanted.summary["rounds"] == 3


@pytest.mark.slow
def test_a_run_is_resumed_with_the_same_steps_and_no_others(tmp_path: Path) -> None:
    wanted, folder = run(steps=[Cosine()]), tmp_path / "run"

    def stop(row: Any) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder=folder, steps=[Cosine()], callbacks=[stop])
    for others in ([], [Cosine("other")], [Cosine(), Cosine("other")]):
        with pytest.raises(CheckpointError, match="steps"):
            run(folder=folder, resume=True, steps=others)
    again = fedraclora.simulate(wanted.config, steps=[Cosine()])
    assert again.summary["ledger_digest"] == wanted.summary["ledger_digest"]
    with pytest.raises(ConfigError, match=r"Cosine.*steps=\[\.\.\.\]"):
        fedraclora.simulate(wanted.config)


SAME = Cosine()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([Cosine], r"Cosine\(\.\.\.\)"),
        ([print], "callbacks"),
        ([fedraclora.Callback()], "callbacks"),
        (5, "has 5"),
        ("cosine", "'cosine'"),
        ([SAME, SAME], "once"),
        ([Cosine("train_loss")], "train_loss"),
        ([Cosine(), Cosine()], "cosine"),
    ],
)
def test_what_is_no_step_is_refused_by_name(steps: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(steps=steps)


def test_a_step_among_callbacks_is_sent_to_steps() -> None:
    with pytest.raises(ConfigError, match="steps"):
        run(callbacks=[Cosine()])
