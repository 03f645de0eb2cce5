"""Clients that measure under secure sums: the row of the open run, and nobody's own numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.clients import secure
from fedraclora.errors import ConfigError
from fedraclora.privacy.secagg import SecAgg, SecAggTerms
from fedraclora.run.client_state import ClientStore
from fedraclora.wire.exchange import Stage, TrainRequest
from tests.common import normal

X = normal(100, 4).float()
CLIENTS = [(x, (x[:, 0] > 0).long()) for x in X.split([1, 9, 20, 30, 40])]  # the first has too few
MODEL = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
WORDS = ("output.progress=false", "local.lr=0.1", "method.rank=2", "method.alpha=3")
WORDS += ("weights=uniform", "evaluate.share=0.4", "rounds=2", "method=fed_rac_lora")
SECURE = "secure=secagg"


def simulated(*words: str, **more: Any) -> fedraclora.Run:
    return fedraclora.simulate(*WORDS, *words, model=MODEL, data=CLIENTS, test=0, **more)


@pytest.mark.parametrize("more", ["evaluate.personal=true", "method=fedsa_lora"])
def test_the_row_is_that_of_the_open_sums_and_no_client_has_one(more: str, tmp_path: Path) -> None:
    words = ["evaluate.clients=all", "rounds=1", more]
    open_, hidden = simulated(*words), simulated(*words, SECURE, folder=tmp_path / "run")
    assert len(open_.clients)
    assert not len(hidden.clients)
    assert not (tmp_path / "run" / "clients.parquet").exists()
    for before, after in zip(open_.rows, hidden.rows, strict=True):
        wanted: Any = before["clients"]
        found: Any = after["clients"]
        assert (found["n"], found["samples"]) == (4, wanted["samples"])
        assert found["in_sum"] == 5
        names = [name for name, each in wanted.items() if isinstance(each, dict)]
        assert names == [name for name, each in found.items() if isinstance(each, dict)]
        for name in names:
            for key in ("mean", "std", "pooled"):  # weights differ by the steps of secure sums
                assert found[name][key] == pytest.approx(wanted[name][key], abs=1e-5)
        assert after["metrics"] == {n: found[n]["pooled"] for n in ("accuracy", "loss")}


def test_no_mask_serves_two_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of a client's own, nor one of a pair, in any round, of updates or measurements."""
    own, pairs = Counter[str](), Counter[tuple[str, str]]()

    def seed(seed: str, count: int, mask: Any = secure.own_mask) -> Any:
        own[seed] += 1
        return mask(seed, count)

    def pair(mine: str, theirs: str, count: int, *, add: bool, mask: Any = secure.pair_mask) -> Any:
        pairs[mine, theirs] += 1
        return mask(mine, theirs, count, add=add)

    monkeypatch.setattr(secure, "own_mask", seed)
    monkeypatch.setattr(secure, "pair_mask", pair)
    simulated(SECURE, "evaluate.clients=all", "evaluate.personal=true")
    assert len(own) == 5 * (2 + 3)  # two rounds, and three measurements
    assert len(pairs) == 4 * len(own)
    assert {*own.values(), *pairs.values()} == {1}


def test_a_client_measures_once_in_a_round_and_trains_all_the_same() -> None:
    store, terms = ClientStore(), SecAggTerms(SecAgg(), "uniform")

    def asked(name: str, round_: int, settings: dict[str, Any], data: Any = None) -> Any:
        request = TrainRequest(round_, 0, 1.0, torch.tensor([7]))
        return secure.answer_stage(request, Stage(name, settings, {7: data}), store, terms)

    measured = {secure.MEASUREMENTS: True}
    assert asked("keys", 3, measured).stage.data
    keys = {7: asked("keys", 3, {}).stage.data[7]}
    of_others = {"8": keys[7], "9": keys[7], "10": keys[7]}
    assert asked("shares", 3, {}, of_others).stage.data
    # That training has come so far is nothing to the sum of measurements.
    assert "stands after keys" in asked("unmask", 3, measured).failures[7]
    memory = secure._recall(store, 7, 3, Stage("shares", measured, {}))
    secure._remember(store, 7, memory | {"near": [], "held": {}, "threshold": 2},
                     Stage("masked", measured, {}))  # fmt: skip
    assert "does not answer twice" in asked("keys", 3, measured).failures[7]
    assert asked("keys", 4, measured).stage.data
    assert asked("keys", 3, {}).stage.data


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["privacy=client_level", "weights=uniform", SECURE], "with privacy beside"),
        (["local=dp_sgd"], r"not go with local\.dp"),
    ],
)
def test_what_would_cost_privacy_that_nobody_accounts_is_refused(
    words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.clients is cohort.*{said}.*no noise"):
        simulated("evaluate.clients=cohort", *words)
