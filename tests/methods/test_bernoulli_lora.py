"""What `BernoulliLora` says of itself, against dense algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedraclora.errors import ConfigError
from fedraclora.strategies.methods.bernoulli_lora import BernoulliLora
from tests.methods.one_matrix import ALPHA, Played, R


def test_bernoulli_draws_the_side_that_the_coin_says() -> None:
    method = BernoulliLora(R, ALPHA, probability=0.4)
    played, trained = Played(method), []
    for number in range(2, 42):
        trained += list(played.sent.trained())
        played = played.next(number)
    assert 8 <= trained.count("w/A") <= 24
    assert trained.count("w/A") + trained.count("w/B") == 40
    sides = {p: list(Played(replace(method, probability=p)).sent.trained()) for p in (0.0, 1.0)}
    assert sides == {0.0: ["w/B"], 1.0: ["w/A"]}


def test_impossible_hyperparameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.probability\b"):
        BernoulliLora(probability=1.5)
