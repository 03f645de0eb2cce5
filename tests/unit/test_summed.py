"""Vectors of what clients measured: their sum has what the open numbers have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedraclora.errors import ClientError, WireError
from fedraclora.evaluation.clients import (
    BINS,
    OF_ONE,
    SummedMeasure,
    read_sizes,
    spread,
    values_of,
    write_sizes,
)
from fedraclora.evaluation.metrics import AFTER, METRICS, Measure
from fedraclora.tree import Layout, Tree

MEASURE = Measure.of(("accuracy", "loss", "auc"), "logistic")
LAYOUT = Layout((("correct", (2,)), ("loss", (2,)), (f"{OF_ONE}auc", (1,))))
SAMPLES = torch.tensor([4, 9, 0, 2, 60])


def sent(seed: int = 0, point: str = "") -> Tree:
    """Of five clients, the third without samples; the AUC of the fourth is not defined."""
    rng, n = np.random.default_rng(seed), SAMPLES.double().numpy()
    right = np.floor(rng.uniform(size=5) * (n + 1))
    loss, area = rng.uniform(0.01, 900.0, 5) * n, rng.uniform(size=5)
    area[3] = np.nan
    columns = {"correct": (right, n), "loss": (loss, n), f"{OF_ONE}auc": (area,)}
    return {point + k: torch.from_numpy(np.stack(v, axis=1)) for k, v in columns.items()}


def total(words: Any) -> Any:
    """The sum modulo 2^32."""
    return words.astype(np.uint64).sum(axis=0).astype(np.uint32)


def test_a_sum_has_the_means_and_deviations_of_the_open_numbers() -> None:
    points = ("", AFTER)
    summed = SummedMeasure(MEASURE, LAYOUT, points)
    whole = sent(0) | sent(1, AFTER)
    words = summed.words(whole, SAMPLES)
    assert words.shape == (5, summed.size)
    row: Any = summed.row(total(words), 5, 3)
    assert (row["n"], row["samples"]) == (4, 75)
    kept = torch.tensor([0, 1, 3, 4])
    for point, own in (("", sent(0)), (AFTER, sent(1))):
        values, pooled = values_of(MEASURE, {n: t[kept] for n, t in own.items()}, "")
        for metric, value in values.items():
            wanted, found = spread(metric, value, pooled[metric]), row[point + metric]
            for key in ("mean", "std", "pooled"):
                assert found[key] == pytest.approx(wanted[key], rel=1e-9, abs=1e-9, nan_ok=True)
            assert found.get("n") == wanted.get("n")
            for key in ("min", "p10", "median", "p90", "max", "worst10", "best10"):
                width = 2 / BINS * (1 + abs(wanted[key])) ** 2  # of a place there
                assert wanted[key] - 2 * width < found[key] <= wanted[key] + 1e-12


def test_clients_who_measured_nothing_add_nothing() -> None:
    """Whatever stands in the place of their numbers."""
    summed = SummedMeasure(MEASURE, LAYOUT, ("",))
    assert not summed.words(sent(), SAMPLES)[2].any()
    row: Any = summed.row(np.zeros(summed.size, dtype=np.uint32), 3, 1)
    assert {*row} == {"withheld"}


@pytest.mark.parametrize("least", [3, 4, 5])
def test_nothing_is_told_of_fewer_clients_than_is_set(least: int) -> None:
    """Four have samples, and three of them an AUC: alone its value would be one client's."""
    summed = SummedMeasure(MEASURE, LAYOUT, ("",))
    row: Any = summed.row(total(summed.words(sent(), SAMPLES)), 5, least)
    told = {3: {"accuracy", "loss", "auc"}, 4: {"accuracy", "loss"}, 5: set[str]()}[least]
    assert {name for name, each in row.items() if isinstance(each, dict)} == told
    assert ("n" in row) == ("samples" in row) == (least <= 4)
    assert ("withheld" in row) == (least > 3)
    assert least < 5 or {*row} == {"withheld"}  # not by how many it is too few


@pytest.mark.parametrize("value", [-1.0, -0.25, 0.0, 1.0])
def test_numbers_of_either_sign_come_back_and_stay_in_their_range(value: float) -> None:
    """Of a coefficient from -1 to 1: the pieces of negative numbers add up modulo 2^128."""
    measure = Measure.of(("pearson",), "squared_error")
    summed = SummedMeasure(measure, Layout(((f"{OF_ONE}pearson", (1,)),)), ("",))
    own = {f"{OF_ONE}pearson": torch.full((3, 1), value).double()}
    row: Any = summed.row(total(summed.words(own, torch.ones(3))), 3, 3)
    assert row["pearson"]["mean"] == value
    assert row["pearson"]["std"] == 0
    assert row["pearson"]["min"] == row["pearson"]["max"] == pytest.approx(value, abs=0.01)


def test_the_worst_tenth_follows_the_direction_of_a_metric_of_the_users_own() -> None:
    names = {
        "accuracy": METRICS["accuracy"],
        "mine": replace(METRICS["accuracy"], higher_is_better=False),
    }
    measure = replace(MEASURE, metrics=names)
    summed = SummedMeasure(measure, Layout(LAYOUT.shapes[:1]), ("",))
    own = {name: t for name, t in sent().items() if name == "correct"}
    row: Any = summed.row(total(summed.words(own, SAMPLES)), 5, 3)
    assert row["mine"]["worst10"] == row["mine"]["max"] > row["mine"]["best10"]
    assert row["accuracy"]["worst10"] == row["accuracy"]["min"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_sums_that_cannot_be_added_are_refused(bad: float) -> None:
    own = sent()
    own["loss"][1, 0] = bad
    with pytest.raises(ClientError, match=r"NaN.*too large"):
        SummedMeasure(MEASURE, LAYOUT, ("",)).words(own, SAMPLES)


def test_a_sum_that_no_clients_can_have_sent_is_refused() -> None:
    summed = SummedMeasure(MEASURE, LAYOUT, ("",))
    words = summed.words(sent(), SAMPLES)
    words[0, -1] += 1  # a second place in the histogram of the last metric
    with pytest.raises(WireError, match="histogram"):
        summed.row(total(words), 5, 3)
    with pytest.raises(WireError, match="4 of 3 clients"):
        summed.row(total(summed.words(sent(), SAMPLES)), 3, 3)


def test_a_layout_comes_back_as_it_was_told() -> None:
    assert read_sizes(write_sizes(LAYOUT)) == LAYOUT
    for bad in (None, 3, {"correct": "x"}, {"correct": 0}, {"correct": 2**40}):
        with pytest.raises(WireError, match="no layout"):
            read_sizes(bad)
