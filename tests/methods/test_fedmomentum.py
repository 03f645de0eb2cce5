"""What `FedMomentum` says of itself, against dense algebra."""

from __future__ import annotations

from fedraclora.strategies.methods.fedmomentum import FedMomentum
from tests.methods.one_matrix import ALPHA, Played, R, best, close


def test_fedmomentum_carries_the_leading_part_and_merges_the_rest() -> None:
    played = Played(FedMomentum(R, ALPHA))
    close(played.carried, best(played.mean_product, R))
    close(played.moved, played.mean_product - best(played.mean_product, R))
