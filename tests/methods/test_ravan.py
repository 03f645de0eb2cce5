"""What `Ravan` says of itself, against dense algebra."""

from __future__ import annotations

import pytest
import torch

from fedraclora.errors import ConfigError
from fedraclora.strategies.methods.ravan import BlockDiagonal, Ravan
from tests.common import normal
from tests.methods.one_matrix import ALPHA, M, Played, R, changed, check_cores


def test_the_cores_stand_between_orthonormal_factors() -> None:
    check_cores(Ravan(2, ALPHA, heads=3))


def test_impossible_hyperparameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.heads\b"):
        Ravan(heads=0)
    with pytest.raises(ConfigError, match=r"method\.heads\b"):
        Played(Ravan(1, ALPHA, heads=9))


def test_the_blocks_of_a_core_are_trained_and_nothing_beside_them() -> None:
    gradients = {"w/R": normal(2, 6, 6), "w/B": normal(2, M, R)}
    (found,) = changed(BlockDiagonal(3), gradients)
    mask = torch.block_diag(*[torch.ones(2, 2)] * 3).double()
    assert torch.equal(found["w/R"], gradients["w/R"] * mask)
    assert torch.equal(found["w/B"], gradients["w/B"])
