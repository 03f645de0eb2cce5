"""What `FedExLora` says of itself, against dense algebra."""

from __future__ import annotations

import pytest

from fedraclora.errors import ConfigError
from fedraclora.strategies.methods.fedex_lora import FedExLora
from tests.methods.one_matrix import ALPHA, K, M, Played, R, best, close


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_cut_residual_of_fedex_is_the_nearest_of_its_rank(rank: int) -> None:
    played = Played(FedExLora(R, ALPHA, residual_rank=rank))
    close(played.moved, best(played.mean_product - played.carried, rank))


def test_the_residual_of_fedex_has_no_more_than_its_rank() -> None:
    played = Played(FedExLora(1, ALPHA))
    assert played.after.link is not None
    left, _ = played.after.link.terms["w"].factors
    assert left.shape == (M, K - 1)


def test_impossible_hyperparameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.residual_rank\b"):
        FedExLora(residual_rank=0)
