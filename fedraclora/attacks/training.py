"""Local training of a simulation in which some clients attack."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from fedraclora.attacks.attack import Attack
from fedraclora.protocol.downlink import opening_rows
from fedraclora.protocol.method import Downlink
from fedraclora.rng import hash_key
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.local_result import LocalResult
from fedraclora.tree import Layout, Tree


class AttackedTrainer(CohortTrainer):
    """A trainer whose attackers do not hand over what they trained.

    Args:
        attack: What they do.

    The others are those of `CohortTrainer`.
    """

    def __init__(self, *given: Any, attack: Attack, **named: Any) -> None:
        super().__init__(*given, **named)
        self.attack = attack
        self.attackers = attack.attackers(self.seed, self.data.num_clients)

    @override
    def train(
        self,
        base: Tree,
        downlink: Downlink,
        clients: torch.Tensor,
        *,
        round_: int,
        **given: Any,
    ) -> LocalResult:
        result = super().train(base, downlink, clients, round_=round_, **given)
        hit = torch.nonzero(torch.isin(clients.cpu(), self.attackers)).flatten()
        if not len(hit):
            return result
        layout = Layout(tuple((n, s.shape) for n, s in downlink.uploaded().items()))
        rows = layout.pack({n: result.trained[n][hit].cpu().double() for n, _ in layout.shapes}, 1)
        start = opening_rows(downlink, base, layout, hit)
        key = hash_key(self.seed, "attack", round_)
        moved = self.attack.sent(rows - start, clients[hit], key)
        trained = dict(result.trained)
        for name, tensor in layout.unpack(start + moved).items():
            trained[name] = trained[name].clone()
            trained[name][hit] = tensor.to(trained[name])
        return replace(result, trained=trained)
