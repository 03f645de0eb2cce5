"""What `FloraStacking` says of itself, against dense algebra."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.strategies.methods.flora_stacking import FloraStacking
from tests.methods.one_matrix import ALPHA, COHORT, M, Played, R, close


def test_flora_draws_anew_and_stacks_what_budgets_leave() -> None:
    played = Played(FloraStacking(R, ALPHA))
    starts = [r.sent.trained()["w/A"].sketch for r in (played, played.next(2))]
    assert starts[0] != starts[1]
    assert played.sent.trained()["w/B"].blank
    close(played.moved, played.mean_product)
    some = Played(FloraStacking(R, ALPHA), cohort=replace(COHORT, ranks=torch.tensor([1, 3, 2, 3])))
    assert some.after.link is not None
    factor = some.after.link.terms["w"].factors[0]
    assert factor.numbers is not None
    assert factor.shape == (M, 9)
