"""What `FedSvd` says of itself, against dense algebra."""

from __future__ import annotations

import torch

from fedraclora.strategies.methods.fedsvd import FedSvd
from tests.methods.one_matrix import ALPHA, Played, R, close


def test_fedsvd_keeps_the_product_and_the_row_space() -> None:
    first = Played(FedSvd(R, ALPHA))
    A = first.sent.adapters["w"].factors["A"]
    assert A.drawing is not None
    drawn = A.draw()
    second = first.next(2)
    for played in (first, second):
        B, A_new = played.after.carried["w/B"], played.after.carried["w/A"]
        close(A_new @ A_new.mT, torch.eye(R).double())
        gram = B.mT @ B
        close(gram, torch.diag(gram.diagonal()))
        close(A_new @ drawn.mT @ drawn, A_new)
    frozen = second.sent.adapters["w"].factors["A"]
    assert frozen.numbers is not None
    close(second.carried, second.uplinks.mean()["w/B"] @ frozen.numbers)
