"""Client-level privacy of what clients measure: sensitivity, noise, account, and what is told."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fedraclora
from fedraclora.errors import ConfigError
from fedraclora.privacy.accountant import epsilon
from fedraclora.privacy.client_level import ClientLevel, NoisyMeans
from fedraclora.privacy.secret import Secret
from tests.unit.test_measuring import moons, net

METRICS = {"accuracy": "accuracy", "matthews": "matthews", "finetuned_loss": "loss"}
MEASURED = ["privacy.measure_noise=2", "privacy.measure_bound=3"]
DELTA = 1e-3


def means(count: int = 7, clients: int = 9, least: int = 0, **changes: Any) -> NoisyMeans:
    settings: dict[str, Any] = {"measure_noise": 0.7, "measure_bound": 2.5} | changes
    return NoisyMeans.of(ClientLevel(**settings), METRICS, count, clients, least)


def private(*words: str, **given: Any) -> Any:
    """Run rounds in which clients measure under client-level privacy."""
    settings = {
        "method": "fed_rac_lora",
        "rounds": 4,
        "clients_per_round": 3,
        "data": moons(),
    } | given
    common = [
        "privacy=client_level",
        "aggregation_weights=uniform",
        f"privacy.delta={DELTA}",
        "local.lr=0.1",
    ]
    common += ["evaluate.share=0.4", "output.progress=false", "evaluate.min_clients=3"]
    return fedraclora.simulate(*common, *MEASURED, *words, model=net(), **settings)


def composed(trained: int, measured: int, share: float, sampling: float) -> float:
    """Epsilon by a composition of single events, written out."""
    from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    for noise, chance in [(1.0, share)] * trained + [(2.0, sampling)] * measured:
        event = GaussianDpEvent(noise)
        accountant.compose(event if chance == 1 else PoissonSampledDpEvent(chance, event))
    return float(accountant.get_epsilon(DELTA))


@given(
    each=st.lists(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 3), min_size=1),
    gone=st.integers(0, 100),
)
def test_one_client_moves_sums_and_count_by_at_most_half_the_root_of_their_number(
    each: list[tuple[float, ...]], gone: int
) -> None:
    table = np.array(each, np.float64).reshape(-1, 3)
    fewer = np.delete(table, gone % len(table), axis=0)
    sums = [
        means().summed(dict(zip(METRICS, found.T, strict=True)), len(found))
        for found in (table, fewer)
    ]
    assert float((sums[0] - sums[1]).norm()) <= math.sqrt(4) / 2 * (1 + 1e-12) + 1e-12


def test_the_greatest_values_reach_that_bound() -> None:
    values = {name: np.array([1e9]) for name in METRICS}
    assert float(means().summed(values, 1).norm()) == pytest.approx(math.sqrt(4) / 2, rel=1e-12)


def test_the_noise_has_the_deviation_that_is_told_and_no_bias() -> None:
    rng, draws = np.random.default_rng(0), 2000
    values = {"accuracy": rng.random(7), "matthews": rng.uniform(-1, 1, 7)}
    values["finetuned_loss"] = rng.uniform(0, 2.5, 7)
    found = [means().released(values, 7, Secret(bytes(32)), round_) for round_ in range(draws)]
    for name, width in (("accuracy", 1.0), ("matthews", 2.0), ("finetuned_loss", 2.5)):
        drawn = np.array([each[name]["mean"] for each in found])
        told = found[0][name]["noise"]
        assert told == pytest.approx(0.7 * width * math.sqrt(4) / 2 / 7, rel=1e-12)
        assert drawn.std() == pytest.approx(told, rel=5 / math.sqrt(2 * draws))
        assert abs(drawn.mean() - values[name].mean()) < 5 * told / math.sqrt(draws)
    noises = np.array([[each[name]["mean"] for name in METRICS] for each in found])
    assert abs(np.corrcoef(noises.T) - np.eye(3)).max() < 5 / math.sqrt(draws)


@pytest.mark.parametrize("came", [1, 4, 5, 9])
def test_nothing_is_released_where_too_few_have_sent_something(came: int) -> None:
    """By the noisy number, which the account has already: at little noise that is the number."""
    values = {name: np.full(came, 0.25) for name in METRICS}
    found = means(measure_noise=1e-3, least=5).released(values, came, Secret(bytes(32)), 0)
    assert ({*found} == {"withheld"}) == (came < 5)
    assert came < 5 or {*found} == {*METRICS}
    loud = means(measure_noise=3.0, least=5)
    told = [loud.released(values, came, Secret(bytes(32)), r) for r in range(400)]
    share = sum("withheld" in each for each in told) / 400  # deviation 3 sqrt(4) of the number
    wanted = 0.5 + 0.5 * math.erf((4.5 - came) / (3 * math.sqrt(4)) / math.sqrt(2))
    assert share == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 400))


def test_who_measures_is_drawn_by_other_coins_than_who_trains() -> None:
    secret, rounds = Secret(bytes(32)), 1000
    trains = ClientLevel().settle(9, 7, rounds)
    coins = torch.zeros(2, rounds, 9, dtype=torch.float64)
    for round_ in range(rounds):
        coins[0, round_, trains.sample(secret, round_, 9)] = 1
        coins[1, round_, means().sample(secret, round_, 9)] = 1
    for side in coins:
        assert float(side.mean()) == pytest.approx(7 / 9, abs=0.02)
    together = float(np.corrcoef(coins.reshape(2, -1).numpy())[0, 1])
    assert abs(together) < 5 / math.sqrt(rounds * 9)


def test_trained_and_measured_cost_what_gaussians_together_do() -> None:
    one = (3 / 1.5**2 + 5 / 2.0**2) ** -0.5
    assert epsilon(1.5, 1.0, 3, DELTA, (2.0, 1.0, 5)) == pytest.approx(
        epsilon(one, 1.0, 1, DELTA), rel=1e-9
    )
    assert epsilon(1.5, 1.0, 0, DELTA, (0.0, 1.0, 1)) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize("who", ["all", "round"])
def test_a_row_has_noisy_means_alone_and_the_account_of_all_releases(who: str) -> None:
    data = [*moons(), tuple(side[:1] for side in moons()[0])]  # one holds nothing out
    run = private(f"evaluate.clients={who}", "evaluate.clients_every=3", data=data)
    measured = 0
    for row in run.rows:
        round_, due = row["round"], row["round"] in {0, 3, 4}
        measured += due
        assert ("clients" in row) == due
        if due:
            column = row["clients"]
            told = {*column} - {"uplink_bytes", "downlink_bytes"}
            assert told in ({"accuracy", "loss"}, {"withheld"})  # by a noisy number of clients
            assert all({*column[name]} == {"mean", "noise"} for name in told - {"withheld"})
        if round_ in {0, 3}:  # the one before training, and both releases of a round
            wanted = composed(round_, measured, 3 / 7, 1 if who == "all" else 3 / 7)
            assert row["privacy"]["epsilon"] == pytest.approx(wanted, rel=1e-9)
    assert not len(run.clients)


@pytest.mark.slow
def test_a_measurement_that_no_coin_chose_anybody_for_is_noise_and_is_paid_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(NoisyMeans, "sample", lambda *_: torch.arange(0))
    words = ("evaluate.clients=round", "evaluate.personal=true", "evaluate.clients_every=1")
    run = private(*words, rounds=7)
    assert all(row["clients"]["uplink_bytes"] == 0 for row in run.rows)
    told = [row["clients"] for row in run.rows if "withheld" not in row["clients"]]
    assert all(column["finetuned_loss"]["mean"] != 1.5 for column in told)
    assert all(column["accuracy"]["noise"] > 0 for column in told)
    wanted = composed(7, 8, 3 / 6, 3 / 6)
    assert run.rows[-1]["privacy"]["epsilon"] == pytest.approx(wanted, rel=1e-9)


def test_without_noise_to_speak_of_the_means_are_those_of_the_clients() -> None:
    words = ("evaluate.clients=all", "evaluate.personal=true")
    noisy = private(*words, "privacy.measure_noise=1e-9", rounds=1)
    open_ = fedraclora.simulate(
        *(*words, "evaluate.share=0.4", "output.progress=false"),
        *("local.lr=0.1", "aggregation_weights=uniform"),
        model=net(), data=moons(), method="fed_rac_lora", rounds=1, clients_per_round=3,
    )  # fmt: skip
    for name in ("accuracy", "loss", "finetuned_accuracy", "finetuned_loss"):
        wanted = open_.rows[0]["clients"][name]["mean"]
        assert noisy.rows[0]["clients"][name]["mean"] == pytest.approx(wanted, abs=1e-6)


def test_a_target_is_spent_on_both() -> None:
    words = ["privacy.noise_multiplier=null", "privacy.target_epsilon=6"]
    run = private("evaluate.clients=all", *words, clients_per_round=6)
    assert 5.99 < run.rows[-1]["privacy"]["epsilon"] <= 6
    with pytest.raises(ConfigError, match=r"privacy\.measure_noise"):
        private("evaluate.clients=all", *words, "privacy.measure_noise=0.1", clients_per_round=6)


@pytest.mark.slow
def test_a_run_that_goes_on_draws_the_same_noise_and_keeps_the_account(tmp_path: Path) -> None:
    words = ("evaluate.clients=round", "evaluate.clients_every=3", "output.plots=false")
    private(*words, rounds=1, folder=tmp_path / "run")  # measured after 0 and 1
    assert not (tmp_path / "run" / "clients.parquet").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    rows = [
        private(*words, rounds=3, folder=tmp_path / name, resume=True).rows
        for name in ("run", "copy")
    ]
    for one, other in zip(*rows, strict=True):
        assert one.get("clients") == other.get("clients")
        assert one.get("privacy") == other.get("privacy")
    assert ["clients" in row for row in rows[0]] == [True, True, False, True]
    wanted = composed(3, 3, 1 / 2, 1 / 2)
    assert rows[0][-1]["privacy"]["epsilon"] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["privacy.measure_noise=null"], r"set privacy\.measure_noise"),
        (["privacy.measure_bound=null"], r"clients measure loss.*privacy\.measure_bound"),
        (["secure=secagg"], r"beside secure=secagg"),
        (["evaluate.clients=none", "evaluate.share=null"], r"privacy\.measure_noise=2"),
        (["evaluate.min_clients=7"], r"evaluate\.clients asks 6, evaluate\.min_clients=7"),
        (["evaluate.min_clients=2"], r"evaluate\.min_clients=2: expected 3 or more"),
        (["stop.patience=2", "stop.metric=clients.accuracy.worst10"], r"accuracy\.worst10"),
    ],
)
def test_what_no_noise_would_cover_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        private("evaluate.clients=all", *words)
