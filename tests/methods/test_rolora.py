"""What `RoLora` says of itself, against dense algebra."""

from __future__ import annotations

import torch

from fedraclora.strategies.methods.rolora import RoLora
from tests.methods.one_matrix import ALPHA, Played, R


def test_rolora_trains_the_factors_in_turn() -> None:
    played = Played(RoLora(R, ALPHA))
    for number, label in ((1, "B"), (2, "A"), (3, "B"), (4, "A")):
        assert list(played.sent.trained()) == [f"w/{label}"]
        kept = {n: t for n, t in played.before.carried.items() if n != f"w/{label}"}
        assert all(torch.equal(played.after.carried[n], t) for n, t in kept.items())
        played = played.next(number + 1)
