"""A short form of the campaign of replays."""

from __future__ import annotations

import pytest

from tests.campaigns.replays import HONEST, LEFT_OUT, SETTINGS, campaign, trial


@pytest.mark.long
@pytest.mark.parametrize("name", SETTINGS)
def test_no_reply_to_another_question_counts(name: str) -> None:
    counts = trial(name, 500, 4)
    assert sum(counts[kind] for kind in LEFT_OUT) > 3
    assert sum(counts[kind] for kind in HONEST) > 10


@pytest.mark.slow
def test_a_replay_of_another_run_from_the_same_weights_is_left_out() -> None:
    counts = campaign(8, ["coded"], rounds=2, first=700)
    assert counts["answered another run"] > 2
    assert counts["runs"] == 1
