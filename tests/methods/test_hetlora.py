"""What `HetLora` says of itself, against dense algebra."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.strategies.methods.hetlora import HetLora
from tests.methods.one_matrix import ALPHA, COHORT, P, Played, R, close


def test_hetlora_weighs_by_the_norms_of_products_and_cuts_by_budgets() -> None:
    ranks = torch.tensor([1, 3, 2, 3])
    first = Played(HetLora(R, ALPHA))
    played = Played(first.method, first.after, 2, replace(COHORT, ranks=ranks))
    starts = played.sent.trained()
    for label, axis in (("w/B", 1), ("w/A", 0)):
        start = starts[label].numbers
        assert start is not None
        for k, rank in enumerate(ranks.tolist()):
            inside, beyond = start[k].split([rank, R - rank], dim=axis)
            assert torch.equal(inside, first.after.carried[label].split([rank, R - rank], axis)[0])
            assert torch.count_nonzero(beyond) == 0
    stack = played.uplinks.stack()
    B, A = stack["w/B"].clone(), stack["w/A"].clone()
    for k, rank in enumerate(ranks.tolist()):
        B[k, :, rank:], A[k, rank:] = 0, 0
    norms = torch.linalg.matrix_norm(B @ A)
    w = P * norms / (P * norms).sum()
    close(played.after.carried["w/B"], (w[:, None, None] * B).sum(0))
    close(played.after.carried["w/A"], (w[:, None, None] * A).sum(0))
