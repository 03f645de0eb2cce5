"""The short form of the campaign of training functions, and that it sees what is wrong."""

from __future__ import annotations

import logging

import pytest

from tests.campaigns import own_training
from tests.campaigns.own_training import DEEDS, RETURNS, drawn, judged, runs


@pytest.fixture(autouse=True)
def no_log() -> object:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("times", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_nothing_wrong_is_silent(times: int) -> None:
    said = {case: judged(case) for case in (drawn(1, number) for number in range(times))}
    assert {case: why for case, why in said.items() if why} == {}


def test_there_are_two_hundred_kinds_and_most_must_fail() -> None:
    cases = {drawn(0, number) for number in range(400)}
    assert len({case[:3] for case in cases}) > 100
    assert len(cases) > 200
    assert {runs(case) for case in cases} == {True, False}
    assert len(DEEDS) + len(RETURNS) > 80


def test_a_check_that_is_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedraclora.training.own.round.Asked.moved", lambda *_: [])
    case = ("W moved", "what was read", "as it should", "plain", "plain")
    assert judged(case).startswith("silent")
    own_training.reference.cache_clear()
