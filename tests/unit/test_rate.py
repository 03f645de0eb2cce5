"""``local.lr=auto``: the rule is near what was tuned, prints itself, and refuses what it lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.binding import bind
from fedraclora.commands.study.entries import is_tuned, read_lines, tried_values, tuned_value
from fedraclora.commands.study.file import Study, row_config
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Cohort, Draw, Method
from fedraclora.protocol.plan import make_plan
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.rate import FITTED, rate_of
from fedraclora.tree import weights_of

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
SHAPES = {  # [m, n] of the layers of a model, by its choice
    "hf": [(384, 384)] * 4 + [(1536, 384), (384, 1536)],
    "gpt": [(288, 96), (96, 96), (384, 96), (96, 384)],
    "causal_lm": [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)],
    "mlp": [(128, 784), (10, 128)],
}
# By the kind of what clients train: one factor of two, and both.
ONE = {"fed_rac_lora", "ffa_lora", "pool_rac_lora"}
BOTH = {"fedavg_lora", "lora_fair", "fedex_lora", "flora_stacking", "lora"}


def rule(config: dict[str, Any]) -> float:
    """The rule's rate for a recorded run."""
    method: Method = bind("method", METHODS, config["method"])()
    shapes = SHAPES[config["model"]["name"]]
    model = torch.nn.Sequential(*(torch.nn.Linear(n, m, bias=False) for m, n in shapes))
    plan = make_plan(model, (), head_policy="lora")
    state = method.initial_state(weights_of(model), plan, Draw(0))
    sent = method.open_round(state, 1, Cohort(torch.arange(4), torch.ones(4)), Draw(0))
    local = config["local"]
    return rate_of(sent, local["optimizer"], local["steps"] or 37.5)


def recorded(folder: str, methods: set[str]) -> Iterator[tuple[dict[str, Any], float, list[float]]]:
    """Runs of a study at their tuned rates, these, and the rates beside them in the grid."""
    study = Study.read(RESULTS / folder / "study.yaml")
    done = read_lines(RESULTS / folder / "runs.jsonl")
    for row in study.rows:
        if not is_tuned(study, row, done):
            continue
        tuned, tried = tuned_value(study, row, done), sorted({*tried_values(study, row, done)})
        config = done[study.jobs("final", row, [tuned])[0].key]["config"]
        plain = config["local"]["clip"] is None and not config["local"]["momentum"]
        sided = config["method"].get("train") != "A"
        if plain and sided and config["method"]["name"] in methods:
            rank = config["method"]["rank"]
            if rank >= 1 and config["method"].get("sketches", 1) == 1:
                at = tried.index(tuned)
                yield config, tuned, tried[max(0, at - 1) : at + 2]


TASKS = {
    "MNIST": "traffic_mnist",
    "STS-B": "stsb_links",
    "CoLA": "cola_links",
    "Rotten Tomatoes": "rotten_tomatoes_links",
    "Shakespeare": "shakespeare_links",
    "SmolLM2": "smollm2",
}


@pytest.mark.parametrize("methods", [ONE, BOTH], ids=["one factor", "both factors"])
@pytest.mark.parametrize("task", TASKS)
def test_the_rule_is_within_a_factor_of_two_of_what_was_tuned(task: str, methods: set[str]) -> None:
    """The median over rows is; each row is so of the tuned rate or of the next one of its grid."""
    found = [(rule(c), tuned, near) for c, tuned, near in recorded(TASKS[task], methods)]
    assert found
    assert abs(math.log2(median(rate / tuned for rate, tuned, _ in found))) <= 1
    assert all(any(0.5 <= rate / x <= 2 for x in near) for rate, _, near in found)


def test_other_constants_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FITTED, "adamw", {key: 4 * c for key, c in FITTED["adamw"].items()})
    with pytest.raises(AssertionError):
        test_the_rule_is_within_a_factor_of_two_of_what_was_tuned("CoLA", ONE)


def test_layers_narrower_than_any_that_was_tuned_have_no_higher_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"method": {"name": "ffa_lora", "rank": 2}, "model": {"name": "mlp"}}
    local = {"optimizer": "adamw", "steps": 4}
    found = []
    for shapes in ([(96, 97)], [(12, 9)]):
        monkeypatch.setitem(SHAPES, "mlp", shapes)
        found.append(rule({**config, "local": local}))
    assert found[0] == found[1] == pytest.approx(55 / (2 * 96 * 2))


WORDS = ("rounds=1", "data=digits", "model.hidden=[12]", "clients=4", "clients_per_round=4")


def test_a_run_says_its_rate_and_is_that_of_the_number(capsys: pytest.CaptureFixture[str]) -> None:
    run = fedraclora.simulate(*WORDS, "local.lr=auto", "method.rank=3", "method.alpha=6")
    rate = run.config["local"]["lr"]  # type: ignore[index]
    assert rate == pytest.approx(1.1 / 4, rel=0.05)  # the scale is 2
    assert f"learning rate {rate:g}, by the rule" in capsys.readouterr().out
    told = fedraclora.simulate(*WORDS, f"local.lr={rate}", "method.rank=3", "method.alpha=6")
    assert told.summary["weights_digest"] == run.summary["weights_digest"]


@pytest.mark.parametrize(
    "word", ["method=fedavg", "local=momentum", "local.clip=1", "local.prox=0.1", "method=fed_sb"]
)
def test_what_the_rule_does_not_know_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"local\.lr=auto.*Set local\.lr="):
        fedraclora.simulate(*WORDS, "local.lr=auto", word)


def test_numbers_to_predict_are_refused_under_sgd() -> None:
    words = [
        "data=least_squares",
        "model=linear",
        "clients=4",
        "clients_per_round=4",
        "local.lr=auto",
    ]
    with pytest.raises(ConfigError, match="squared_error"):
        fedraclora.simulate(*words, "pretrain=none", "partition=iid")


def test_own_training_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"local\.lr=auto"):
        fedraclora.simulate(*WORDS, "local.lr=auto", train=print)


def test_a_study_takes_the_rate_of_the_rule_for_each_row(tmp_path: Path) -> None:
    text = "experiment: null\nmetric: accuracy\ngrid: {key: method.alpha, values: [4]}\n"
    text += "overrides: [data=digits, local.lr=auto]\nfinal: {seeds: [0], overrides: []}\n"
    (tmp_path / "a.yaml").write_text(text + "rows: {four: [method.rank=4], eight: []}\n")
    plan = Study.read(tmp_path / "a.yaml")
    found = [row_config(plan, row, "final") for row in plan.rows]
    rates = [config.local.lr for config in found if config is not None]
    assert rates == pytest.approx([1.1, 4.4])  # the scale is 1, and one half
