"""The short form of the campaign of training functions, and that it sees what is wrong."""

from __future__ import annotations

import logging

import pytest

from tests.campaigns import own_training
from tests.campaigns.own_training import DEEDS, LATE, RETURNS, Case, drawn, judged


@pytest.fixture(autouse=True)
def no_log() -> object:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.parametrize("times", [3, pytest.param(60, marks=pytest.mark.long)])
def test_nothing_wrong_is_silent(times: int) -> None:
    said = {case: judged(case) for case in (drawn(1, number) for number in range(times))}
    assert {case: why for case, why in said.items() if why} == {}


def test_there_are_three_hundred_kinds_and_most_must_fail() -> None:
    cases = {drawn(0, number) for number in range(400)}
    assert len({(case.deed, case.given, case.way) for case in cases}) > 130
    assert len(cases) > 300
    assert {case.must_run for case in cases} == {True, False}
    assert {case.fails for case in cases} == {"never", "once", "from then on", "later"}
    assert LATE.keys() <= {case.deed for case in cases}
    assert len(DEEDS) + len(RETURNS) > 120


@pytest.mark.parametrize(
    ("place", "other", "case"),
    [
        ("round.ClientTask.moved", lambda *_: [], Case("W moved")),
        ("round.Round.check", lambda *_: None, Case(given="by hand, doubled")),
        ("round._check_scale", lambda *_: None, Case("scale times 100")),
        ("trainer.what_differs", lambda *_: None, Case("data by .data")),
    ],
)
def test_a_check_that_is_left_out_is_seen(
    monkeypatch: pytest.MonkeyPatch, place: str, other: object, case: Case
) -> None:
    monkeypatch.setattr(f"fedraclora.training.own.{place}", other)
    assert judged(case).startswith("silent")
    own_training.reference.cache_clear()
