"""What `FedRotLora` says of itself, against dense algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.fedrot_lora import FedRotLora, rotations
from tests.methods.one_matrix import ALPHA, COHORT, DRAW, K, M, N, P, Played, R, close


def nearest_rotation(matrix: torch.Tensor) -> torch.Tensor:
    """The rotation with the least squared distance to a matrix."""
    U, _, Vt = np.linalg.svd(matrix.numpy())
    turn = np.diag([1.0] * (len(U) - 1) + [np.linalg.det(U) * np.linalg.det(Vt)])
    return torch.from_numpy(U @ turn @ Vt)


@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_fedrot_turns_factors_towards_the_last_ones_in_turn(strength: float) -> None:
    first = Played(FedRotLora(R, ALPHA, strength=strength))
    mean = first.uplinks.mean()
    for label in ("w/B", "w/A"):
        close(first.after.carried[label], mean[label])
    second = first.next(2)
    for played, aligned in ((second, "A"), (second.next(3), "B")):
        B0, A0 = played.before.carried["w/B"], played.before.carried["w/A"]
        stack, B, A = played.uplinks.stack(), torch.zeros(M, R), torch.zeros(R, N)
        for k in range(K):
            Bk, Ak = stack["w/B"][k], stack["w/A"][k]
            whole = nearest_rotation(Ak @ A0.mT if aligned == "A" else Bk.mT @ B0)
            turn = nearest_rotation((1 - strength) * torch.eye(R).double() + strength * whole)
            B, A = B + P[k] * Bk @ turn, A + P[k] * turn.mT @ Ak
        close(played.after.carried["w/B"], B)
        close(played.after.carried["w/A"], A)


def test_fedrot_undoes_a_rotation_of_the_factors() -> None:
    """Clients that send one product in coordinates of their own lose nothing in the mean."""
    rng, method = generator(5, "turned"), FedRotLora(R, ALPHA)
    before = Played(method).next(2).after
    sent = method.open_round(before, 3, COHORT, DRAW)
    turns = rotations(torch_normal(rng, K, R, R))
    B, A = before.carried["w/B"], before.carried["w/A"]
    layout = sent.layout
    rows = layout.pack({"w/B": B @ turns, "w/A": turns.mT @ A}, lead=1)
    after = method.close_round(before, sent, Uplinks(COHORT.clients, COHORT.weights, layout, rows))
    close(after.carried["w/B"], B)
    close(after.carried["w/A"], A)
    close(turns.mT @ turns, torch.eye(R).double().expand(K, R, R))
    close(torch.linalg.det(turns), torch.ones(K).double())
