"""Clients that measure under secure sums: the row of the open run, and nobody's own numbers."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
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
WORDS += ("aggregation_weights=uniform", "evaluate.share=0.4", "rounds=2", "method=fed_rac_lora")
SECURE = "secure=secagg"
THREE = "evaluate.min_clients=3"
TOOK = {"uplink_bytes", "downlink_bytes", "texts_up", "texts_down"}


def simulated(*words: str, **more: Any) -> fedraclora.RunResult:
    given: dict[str, Any] = {"data": CLIENTS} | more
    return fedraclora.simulate(*WORDS, *words, model=MODEL, test=0, **given)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["evaluate.personal=true", "method=fedsa_lora"])
def test_the_row_is_that_of_the_open_sums_and_no_client_has_one(more: str, tmp_path: Path) -> None:
    words = ["evaluate.clients=all", "rounds=1", more]
    open_, hidden = simulated(*words), simulated(*words, SECURE, THREE, folder=tmp_path / "run")
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


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "evaluate.personal=true"])
def test_nothing_is_released_of_what_fewer_than_five_clients_measure(
    more: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Four of five hold samples out: neither how many, nor who, nor what they measured is told."""
    words = ["evaluate.clients=all", SECURE, *([more] if more else [])]
    with caplog.at_level(logging.INFO):
        few = simulated(*words)
    assert not [record for record in caplog.records if "too few" in record.getMessage()]
    for row in few.rows:
        told: Any = row["clients"]
        assert {*told} == TOOK | {"withheld"}
        assert row["metrics"] == {}
    told = few.summary["by_clients"]
    assert "withheld" in told
    x, y = CLIENTS[-1]
    data = [*CLIENTS, (x + 1, y)]
    enough: Any = simulated(*words, data=data).rows[0]["clients"]
    open_: Any = simulated(*words[:1], *words[2:], data=data).rows[0]["clients"]
    assert enough["n"] == 5
    assert enough["accuracy"]["mean"] == pytest.approx(open_["accuracy"]["mean"], abs=1e-9)


def test_a_run_that_could_never_release_anything_does_not_begin() -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.clients asks 5, evaluate\.min_clients=6"):
        simulated("evaluate.clients=all", SECURE, "evaluate.min_clients=6")


def test_a_client_of_a_sum_of_measurements_counts_who_is_still_in_it() -> None:
    """One that holds something out and leaves is counted no more; one that has nothing never is."""
    terms = SecAggTerms(SecAgg(), "uniform", 5, measurers=3)
    request, measured = TrainRequest(3, 0, 1.0, torch.arange(5)), {secure.MEASUREMENTS: True}

    def asked(store: ClientStore, name: str, data: Any, holding: tuple[int, ...] = ()) -> Any:
        stage = Stage(name, measured, {0: data} if name == "unmask" else data)
        return secure.answer_stage(request, stage, store, terms, holding)

    for holding, gone, gives in [
        ((0, 1, 2), (), True),
        ((1, 2, 3), (), True),
        ((0, 1, 2), (2,), False),
        ((0, 1, 2), (4,), True),
        ((0, 1), (), False),
        ((1, 2), (4,), False),
        ((), (), False),
    ]:
        store, ids = ClientStore(), [*range(5)]
        keys = asked(store, "keys", dict.fromkeys(ids), holding).stage.data
        pairs = {c: {name: keys[c][name] for name in ("mask", "box")} for c in ids}
        near = {c: {str(n): pairs[n] for n in ids if n != c} for c in ids}
        sealed = asked(store, "shares", near).stage.data
        assert {len(text) for said in sealed.values() for text, *_ in said.values()} == {
            len(sealed[0]["1"][0])
        }
        shares = {str(n): sealed[n]["0"] for n in ids[1:]}
        zeros = {0: lambda: np.zeros(4, dtype=np.uint32)}
        stage = Stage("masked", measured, {0: {"shares": shares, "without": []}})
        assert len(secure.masked_vectors(request, stage, store, zeros, {}).clients) == 1
        alive = [c for c in ids[1:] if c not in gone]
        answer = asked(store, "unmask", {"alive": alive, "gone": [*gone]})
        assert (0 in answer.stage.data) == gives
        assert gives or "evaluate.min_clients=3" in answer.failures[0]


@pytest.mark.slow
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
    assert "has finished keys" in asked("unmask", 3, measured).failures[7]
    memory = secure._recall(store, 7, 3, Stage("shares", measured, {}))
    secure._remember(store, 7, memory | {"near": [], "held": {}, "threshold": 2},
                     Stage("masked", measured, {}))  # fmt: skip
    assert "answers a stage once" in asked("keys", 3, measured).failures[7]
    assert asked("keys", 4, measured).stage.data
    assert asked("keys", 3, {}).stage.data


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["privacy=client_level", "aggregation_weights=uniform", SECURE], "beside secure=secagg"),
        (["local=dp_sgd"], r"not go with local\.dp"),
    ],
)
def test_what_would_cost_privacy_that_nobody_accounts_is_refused(
    words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{said}.*evaluate\.clients=round.*without noise"):
        simulated("evaluate.clients=round", *words)
