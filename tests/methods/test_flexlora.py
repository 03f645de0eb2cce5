"""What `FlexLora` says of itself, against dense algebra."""

from __future__ import annotations

from fedraclora.strategies.methods.flexlora import FlexLora
from tests.methods.one_matrix import ALPHA, Played, R, best, close


def test_flexlora_carries_the_nearest_product_of_its_rank() -> None:
    played = Played(FlexLora(R, ALPHA))
    close(played.carried, best(played.mean_product, R))
    B, A = played.after.carried["w/B"], played.after.carried["w/A"]
    close(B.mT @ B, A @ A.mT)
