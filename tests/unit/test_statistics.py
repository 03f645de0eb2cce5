"""Statistics of runs on frames: what is read of a ledger, and what is computed from it."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from pandas import DataFrame, Series

from fedraclora.run.ledger import Row
from fedraclora.run.statistics import (
    Spread,
    first_reaching,
    last,
    last_within,
    mean_curve,
    measured_value,
    metric_names,
    paired,
    rounds_of,
    steady_within,
)


def ledger(values: list[float | None], *, every: int = 1, up: int = 1000) -> list[Row]:
    """Rows of rounds from 0 on; those between the measured ones have no metrics."""
    return [
        {
            "round": t,
            "metrics": {} if t % every else {"accuracy": value},
            "uplink_total": up * t,
            "downlink_total": 2 * up * t,
            "cohort": 5,
            "seconds": {"train": 0.5, "evaluate": 0.25},
        }
        for t, value in enumerate(values)
    ]


def frame(*runs: list[Row]) -> DataFrame:
    return rounds_of(dict(enumerate(runs)), ["accuracy"])


def test_a_frame_has_a_row_for_each_run_and_round() -> None:
    found = frame(ledger([0.1, None, 0.3], every=2), ledger([0.2]))
    assert [*zip(found["run"], found["round"], strict=True)] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [*found["measured"]] == [True, False, True, True]
    assert [*found["traffic"]] == [0, 3000, 6000, 0]
    assert [*found["seconds"]] == [0.75, 1.5, 2.25, 0.75]
    assert found["virtual_seconds"].isna().all()
    assert [*last(found)["value"]] == [0.3, 0.2]
    nothing = rounds_of({}, ["accuracy"])
    assert nothing.empty
    assert {*nothing.columns} == {*found.columns}


def test_seconds_of_runs_that_share_a_machine_are_not_known() -> None:
    found = frame([{"round": 1, "metrics": {"accuracy": 0.5}, "seconds": 2.5}])
    assert np.isnan(found["seconds"]).all()


def test_a_metric_is_that_of_the_server_or_of_clients_own_models_or_of_clients() -> None:
    own: Row = {"metrics": {"personal_accuracy": 0.5}}
    both: Row = {"metrics": {"accuracy": 0.4, "personal_accuracy": 0.5}}
    assert measured_value(own, metric_names("accuracy")) == 0.5
    assert measured_value(own, ["accuracy"]) is None
    assert measured_value(both, metric_names("accuracy")) == 0.4
    assert math.isnan(measured_value({"metrics": {"accuracy": None}}, ["accuracy"]) or 0.0)
    clients = {"metrics": {}, "clients": {"accuracy": {"worst10": 0.25}}}
    assert measured_value(clients, ["clients.accuracy.worst10"]) == 0.25


def test_a_target_is_reached_in_the_first_round_that_is_no_worse() -> None:
    found = frame(ledger([0.1, 0.5, 0.4, 0.6]), ledger([0.1, 0.2, 0.3, 0.3]))
    assert first_reaching(found, 0.5)["round"].to_dict() == {0: 1}
    assert first_reaching(found, Series({0: 0.6, 1: 0.2}))["uplink"].to_dict() == {0: 3000, 1: 1000}
    assert first_reaching(found, Series({1: 0.2}))["round"].to_dict() == {1: 1}
    assert first_reaching(found, 0.3, higher=False)["round"].to_dict() == {0: 0, 1: 0}


def test_a_budget_is_met_by_the_last_measured_round_but_the_untrained_one() -> None:
    found = frame(ledger([0.1, 0.2, 0.3, 0.4, 0.5], every=2), ledger([0.1, 0.9], up=9000))
    assert last_within(found, 10_000)["value"].to_dict() == {0: 0.3}  # of round 2, not 3
    assert last_within(found, 9000, "uplink")["value"].to_dict() == {0: 0.5, 1: 0.9}
    assert last_within(found, 10).empty


def test_a_steady_value_is_the_mean_of_the_last_quarter() -> None:
    found = frame(ledger([0.0, *np.arange(1.0, 9.0)]), ledger([0.1, 0.9], up=9000))
    steady = steady_within(found, 24_000)
    assert steady["value"].to_dict() == {0: 7.5, 1: 0.1}
    assert steady["round"].to_dict() == {0: 8, 1: 0}


def test_a_mean_curve_has_the_rounds_that_all_runs_measured() -> None:
    found = frame(ledger([0.1, 0.2, 0.3, 0.4, 0.7], every=2), ledger([0.3, 0.4, 0.1, 0.4], up=2000))
    curve = mean_curve(found, "both")
    assert [*curve["round"]] == [0, 2]
    assert [*curve["value"]] == pytest.approx([0.2, 0.2])
    assert [*curve["least"]] == [0.1, 0.1]
    assert [*curve["greatest"]] == [0.3, 0.3]
    assert [*curve["uplink"]] == [0, 3000]
    assert {*curve["run"]} == {"both"}
    assert {*curve["runs"]} == {2}
    lost = mean_curve(frame(ledger([0.1, 0.2]), ledger([None, None])), "lost")
    assert lost.empty


def test_runs_are_paired_by_seed() -> None:
    one, other = Series({0: 0.5, 1: 0.7, 2: 0.9}), Series({2: 0.6, 1: 0.5, 7: 0.0})
    found = paired(one, other)
    assert found.count == 2
    assert found.mean == pytest.approx(0.25)
    assert found.error == pytest.approx(statistics.stdev([0.2, 0.3]) / math.sqrt(2))
    assert paired(one, Series({8: 1.0})).count == 0


def test_a_spread_of_one_value_or_of_one_that_is_not_finite_has_no_deviation() -> None:
    assert Spread.of([0.5]).text(2) == "0.50"
    assert Spread.of([0.4, 0.6]).text(2) == "0.50 ± 0.14"
    lost = Spread.of([0.5, -math.inf])
    assert (lost.mean, lost.count) == (-math.inf, 2)
    assert math.isnan(lost.deviation)
    assert Spread.of_known([0.5, math.nan, -math.inf, 0.7]).mean == pytest.approx(0.6)
    assert math.isnan(Spread.of([]).mean)
    assert math.isnan(Spread.of([]).error)


def test_clocks_of_runs_are_averaged_where_all_have_one() -> None:
    timed = [row | {"virtual_seconds": 40.0 * t} for t, row in enumerate(ledger([0.1, 0.2, 0.3]))]
    curve = mean_curve(frame(timed, timed[:1] + ledger([0.1, 0.2, 0.3])[1:]), "both")
    assert curve["virtual_seconds"].iloc[0] == 0.0
    assert np.isnan(curve["virtual_seconds"].iloc[1:]).all()
