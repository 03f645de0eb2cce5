"""What `LoraFair` says of itself, against dense algebra."""

from __future__ import annotations

import pytest

from fedraclora.errors import ConfigError
from fedraclora.strategies.methods.lora_fair import LoraFair
from tests.methods.one_matrix import ALPHA, Played, R


@pytest.mark.parametrize("ridge", [1e-9, 0.01, 10.0])
def test_lora_fair_finds_the_least_of_its_objective(ridge: float) -> None:
    played = Played(LoraFair(R, ALPHA, ridge=ridge))
    mean = played.uplinks.mean()
    A = played.after.carried["w/A"]
    D = (played.after.carried["w/B"] - mean["w/B"]).clone().requires_grad_()
    gap = played.mean_product - (mean["w/B"] + D) @ A
    (gap.square().sum() + ridge * D.square().sum()).backward()
    assert D.grad is not None
    assert float(D.grad.abs().max()) < 1e-9
    assert float(D.detach().abs().max()) > 1e-3


def test_impossible_hyperparameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.ridge\b"):
        LoraFair(ridge=0.0)
