"""What `SLora` says of itself, against dense algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedraclora.errors import ConfigError
from fedraclora.strategies.methods.slora import SLora, SparseMask
from tests.methods.one_matrix import ALPHA, DRAW, PLAN, Played, R, S, W, best, changed, close


def test_slora_turns_its_change_into_factors_and_keeps_the_rest() -> None:
    plan = replace(PLAN, weights=("w",))
    method = SLora(R, ALPHA, sparse_rounds=2)
    state = method.initial_state({"w": W}, plan, DRAW)
    first = Played(method, state)
    assert first.sent.program.name == "sparse"
    assert "w/B" not in first.after.carried
    second = first.next(2)
    new = second.uplinks.mean()["w"]
    close(S * second.carried, best(new - W, R))
    close(second.after.base["w"], new - best(new - W, R))
    assert list(second.next(3).sent.trained()) == ["w/B", "w/A"]
    assert "w/initial" not in second.after.carried


def test_impossible_hyperparameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.sparse_rounds\b"):
        SLora(sparse_rounds=0)
    with pytest.raises(ConfigError, match=r"method\.density\b"):
        SLora(density=0.0)


def test_a_mask_keeps_its_share_for_good_and_turns_with_its_weight() -> None:
    program = SparseMask(0.3, {"w": 5, "t": 5}, ("t",))
    gradients = {"w": torch.ones(2, 40, 60), "t": torch.ones(2, 60, 40), "bias": torch.ones(2, 9)}
    (first, second), (again,) = changed(program, gradients, gradients), changed(program, gradients)
    assert torch.equal(first["w"], again["w"])
    assert torch.equal(first["w"], second["w"])
    assert torch.equal(first["w"][0], first["w"][1])
    assert torch.equal(first["t"], first["w"].mT)
    assert torch.equal(first["bias"], gradients["bias"])
    assert float(first["w"].mean()) == pytest.approx(0.3, abs=0.03)
