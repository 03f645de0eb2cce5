"""What steps, callbacks, metrics and rules of the user's give is checked, and named if wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typing_extensions import override

import fedraclora
from fedraclora.aggregation.base import Aggregator
from fedraclora.aggregation.server_optimizers import ServerOptimizer
from fedraclora.commands import cli
from fedraclora.errors import ConfigError, DivergenceError
from fedraclora.limits import COLUMNS
from tests.unit.test_own_methods import run as run_of

ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)


def run(*words: str, **keys: Any) -> fedraclora.RunResult:
    x = torch.linspace(-1, 1, 40).reshape(20, 2)
    return run_of(
        "ffa_lora",
        *words,
        model="mlp",
        test=(x, (x[:, 0] > 0).long()),
        data=[(part, (part[:, 0] > 0).long()) for part in (x + 0.1).split(7)],
        **keys,
    )


def step(hook: str, found: object) -> fedraclora.RoundStep:
    made: Callable[..., object] = found if callable(found) else lambda *_, **__: found
    own: dict[str, Any] = {hook: lambda _, *given, **named: made(*given, **named)}
    own["individuals"] = hook == "treat"
    kind: Any = type("Odd", (fedraclora.RoundStep,), own)
    return kind()


def changed(**keys: Callable[[Any], Any]) -> Callable[..., Any]:
    """Change fields of what came, each by a function of all of it."""
    return lambda got, _: replace(got, **{name: make(got) for name, make in keys.items()})


WRONG: list[tuple[str, Any]] = [
    *(("cohort", ids) for ids in (
        [0, 1], np.arange(2), 2, "all", torch.arange(0), torch.tensor([0.0]), torch.tensor([0, 3]),
        torch.tensor([-1, 0]), torch.tensor([1, 0]), torch.tensor([1, 1]), torch.tensor([[0, 1]]),
        torch.tensor([True, False]), torch.tensor(1),
    )),
    *(("send", sent) for sent in (None, "x", {})),
    *(("bound", norm) for norm in ("x", math.nan, -1.0, 0, math.inf, 10**400, True, [1.0])),
    *(("receive", came) for came in ("x", {}, [])),
    *(("treat", got) for got in (None, "x", {}, torch.ones(3))),
    *(("close", after) for after in (None, "x", {})),
    ("treat", changed(stacked=lambda got: got.stacked[:1])),
    ("treat", changed(stacked=lambda got: got.stacked[:, 1:])),
    ("treat", changed(stacked=lambda got: got.stacked.long())),
    ("treat", changed(stacked=lambda got: got.stacked.numpy())),
    ("treat", changed(stacked=lambda got: None)),
    ("treat", changed(weights=lambda got: got.weights[1:])),
    ("treat", changed(weights=lambda got: -got.weights)),
    ("treat", changed(weights=lambda got: 0 * got.weights)),
    ("close", lambda close, state, exchange, got: replace(close(got), base={})),
    ("columns", None),
    ("columns", [1]),
    *(("columns", {name: 1.0}) for name in (3, None, "", "a\nb", "seconds.a", *sorted(COLUMNS))),
    *(("columns", {"mine": value}) for value in (
        10**400, {1}, b"x", 1j, object(), print, [10**400], ENDLESS,
    )),
]  # fmt: skip


@pytest.mark.parametrize(("hook", "found"), WRONG)
def test_what_a_step_cannot_give_is_named_with_its_round(hook: str, found: object) -> None:
    with pytest.raises(ConfigError, match="step Odd") as raised:
        run(steps=[step(hook, found)])
    assert "in round 1" in raised.value.__notes__


@pytest.mark.parametrize("field", ["stacked", "weights"])
def test_a_step_that_gives_no_numbers_is_named(field: str) -> None:
    odd = step("treat", changed(**{field: lambda got: getattr(got, field) * math.nan}))
    with pytest.raises(DivergenceError, match=r"treat .*step Odd.*finite"):
        run(steps=[odd])


@pytest.mark.parametrize(
    ("hook", "found"),
    [
        ("measure", "no"),
        ("measure", []),
        ("measurers", [0]),
        ("measurers", torch.tensor([7])),
        ("measurers", torch.tensor([1, 0])),
    ],
)
def test_what_a_step_that_measures_cannot_give_is_named(hook: str, found: object) -> None:
    with pytest.raises(ConfigError, match="step Odd"):
        run(steps=[step(hook, found)], evaluate={"clients": "round"})


def test_what_a_step_may_give_is_used() -> None:
    two = run(steps=[step("cohort", torch.tensor([0, 2], dtype=torch.int32))])
    assert two.rows[-1]["cohort"] == 2
    given = {"a": np.float32(2), "b": math.nan, "c": 2**70, "d.e": (np.int64(1), torch.ones(2))}
    row = run(steps=[step("columns", given)]).rows[-1]
    assert [row[name] for name in given] == [2.0, None, 2**70, [1, [1.0, 1.0]]]


def test_an_error_inside_a_step_is_told_of_the_step_that_raised_it() -> None:
    class Plain(fedraclora.RoundStep):
        """Has no hook."""

    odd = step("treat", lambda *_: {}["mine"])
    with pytest.raises(KeyError) as raised:
        run(steps=[Plain(), odd])
    assert "step Odd" in " ".join(raised.value.__notes__)
    assert "step Plain" not in " ".join(raised.value.__notes__)


@pytest.mark.parametrize("found", ["no", [], 1, torch.ones(3), torch.ones(1)])
def test_a_callback_ends_a_run_by_true_alone(found: object) -> None:
    class Ends(fedraclora.Callback):
        @override
        def ends(self, rows: Any) -> Any:
            return found

    with pytest.raises(ConfigError, match=r"ends of .*Ends.*True or False"):
        run(callbacks=[Ends()])


@pytest.mark.parametrize("name", ["round", "metrics", "uplink_total", "a b", "a.b", 5, "a\nb"])
def test_a_metric_has_a_name_of_its_own(name: Any) -> None:
    with pytest.raises(ConfigError, match="name"):
        run(metrics=["accuracy", fedraclora.Metric(lambda *_: 1.0, True, name=name)])


@pytest.mark.parametrize("found", [10**400, "0.5", np.str_("TEST"), None, 1j, np.ones(3), {}])
def test_a_metric_gives_one_number(found: object) -> None:
    with pytest.raises(ConfigError, match=r"metric mine .*one number"):
        run(metrics=["accuracy", fedraclora.Metric(lambda *_: found, True, name="mine")])


@pytest.mark.parametrize("function", [None, 5, "accuracy"])
def test_a_metric_is_a_function(function: Any) -> None:
    with pytest.raises(ConfigError, match="a function is wanted"):
        fedraclora.Metric(function)


def test_a_history_has_each_column_once() -> None:
    """A step may call its column as a metric is called."""
    history = run(steps=[step("columns", {"accuracy": 0.25})]).history
    assert history.columns.is_unique
    assert history["accuracy"].iloc[-1] == 0.25
    assert history["metrics.accuracy"].iloc[-1] > 0.25


def rule(made: Callable[..., object]) -> Aggregator:
    hooks = {"__call__": lambda _, *given: made(*given), "name": "odd"}
    kind: Any = dataclass(frozen=True)(type("OddRule", (Aggregator,), hooks))
    return kind()


@pytest.mark.parametrize(
    "made",
    [
        lambda *_: None,
        lambda *_: "x",
        lambda got, _: got.stacked,
        changed(stacked=lambda got: got.stacked[:, 1:]),
        changed(weights=lambda got: 0 * got.weights),
        lambda *_: {}["mine"],
    ],
)
def test_what_an_aggregator_cannot_give_is_named(made: Any) -> None:
    with pytest.raises(ConfigError, match="aggregator OddRule"):
        run(aggregator=rule(made))


def optimizer(made: Callable[..., object]) -> ServerOptimizer:
    hooks = {"advance": lambda _, *given: made(*given), "name": "odd"}
    kind: Any = type("OddSteps", (ServerOptimizer,), hooks)
    return kind()


@pytest.mark.parametrize(
    "made",
    [
        lambda *_: None,
        lambda change, _: change,
        lambda change, _: ({}, {}),
        lambda change, _: ({n: t[None] for n, t in change.items()}, {}),
        lambda change, _: ({n: t > 0 for n, t in change.items()}, {}),
        lambda change, _: (dict.fromkeys(change), {}),
        lambda change, _: (change, None),
        lambda change, _: (change, {"velocity": torch.ones(1)}),
        lambda *_: {}["mine"],
    ],
)
def test_what_a_server_optimizer_cannot_give_is_named(made: Any) -> None:
    with pytest.raises(ConfigError, match="server optimizer OddSteps"):
        run(server_optimizer=optimizer(made))


def test_rules_of_the_users_that_do_nothing_change_nothing() -> None:
    wanted = run().summary["weights_digest"]
    plain = [
        {"aggregator": rule(lambda got, _: got)},
        {"server_optimizer": optimizer(lambda change, moments: (change, moments))},
        {"steps": [step("treat", lambda got, _: got)]},
        {"steps": [step("close", lambda close, state, exchange, got: close(got))]},
    ]
    assert [run(**keys).summary["weights_digest"] for keys in plain] == [wanted] * 4


def test_no_row_has_a_column_that_others_may_give() -> None:
    more: list[dict[str, Any]] = [
        {"evaluate": {"clients": "round"}, "compression": {"uplink": "int8", "downlink": "int8"}},
        {"local": "dp_sgd"},
        {"attack": {"name": "sign_flip", "share": 0.4}},
        {"system": {"drop_out": 0.2}},
    ]
    for keys in more:
        for row in run(**keys).rows:
            assert {*row} <= COLUMNS


def test_a_command_names_the_users_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["import fedraclora", "class Odd(fedraclora.RoundStep):", "    def treat(self, *_):"]
    (tmp_path / "odd_step.py").write_text("\n".join([*lines, "        return {}['mine']", ""]))
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [
        "data=digits",
        "pretrain=none",
        "clients=4",
        "clients_per_round=4",
        "rounds=1",
        "output.dir=null",
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *words, "steps=[odd_step:Odd]"])
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "odd_step.py, line 4" in said
    assert "step Odd" in said
    assert "Traceback" not in said
    assert "bug" not in said
