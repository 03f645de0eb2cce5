"""What `FrLora` says of itself, against dense algebra."""

from __future__ import annotations

import torch

from fedraclora.strategies.methods.frlora import FrLora
from tests.methods.one_matrix import ALPHA, Played, R, S, W, best, close


def test_frlora_restarts_from_the_principal_part() -> None:
    played = Played(FrLora(R, ALPHA))
    B0, A0 = played.before.carried["w/B"], played.before.carried["w/A"]
    close(S * B0 @ A0, best(W, R))
    close(played.before.base["w"], W - best(W, R))
    mean = played.uplinks.mean()
    close(played.moved, mean["w/B"] @ mean["w/A"] - B0 @ A0)
    again = played.next(2).sent.trained()
    assert torch.equal(again["w/B"].opening(), B0)  # type: ignore[arg-type]
    assert torch.equal(again["w/A"].opening(), A0)  # type: ignore[arg-type]
