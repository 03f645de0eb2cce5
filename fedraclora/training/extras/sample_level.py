"""DP-SGD on a chunk: every sample's gradient clipped, and noise on their sum.

The mechanism is in `fedraclora.privacy.sample_level`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from typing_extensions import override

from fedraclora.privacy.sample_level import SampleNoise, answer_keys, seed_key
from fedraclora.protocol.rank_budgets import cut_gradients
from fedraclora.training.extra import ClientChunk, Forward, LocalExtra, LocalResult
from fedraclora.tree import Tree


@dataclass(frozen=True)
class SampleLevel(LocalExtra):
    """DP-SGD on what a client trains.

    Attributes:
        noise: Clip and noise.
    """

    noise: SampleNoise
    form: ClassVar[str] = "local.dp={noise}"
    forms_gradients: ClassVar[bool] = True
    answers_once: ClassVar[bool] = True

    @override
    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        """See `LocalExtra.gradients`.

        For a while every sample is a client of its own: what is trained is repeated for each, and
        so has a gradient for each.
        """

        def apart(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:active].repeat_interleave(width, dim=0)

        leaves = {n: apart(v).detach().requires_grad_() for n, v in chunk.values.items()}
        frozen = {n: apart(f) if f.dim() == 3 else f for n, f in chunk.frozen.items()}
        losses, counts, valid = forward(leaves, frozen)
        each = (losses / counts.clamp(min=1)) * valid.to(losses.dtype)
        found = torch.autograd.grad(each.sum(), list(leaves.values()))
        own = dict(zip(leaves, found, strict=True))
        own = cut_gradients(own, {n: apart(mask) for n, mask in chunk.masks.items()})
        like = {n: v[:active] for n, v in chunk.values.items()}
        key = seed_key(chunk.seed) if chunk.key is None else chunk.key
        keys = answer_keys(key, chunk.round_, chunk.clients[:active])
        noise = self.noise.noise(like, keys, step)
        total = (losses.detach() * valid).sum(dim=1) / (counts * valid).sum(dim=1).clamp(min=1)
        return total, self.noise.gradients(own, valid, noise)

    @override
    def sent(self, result: LocalResult) -> LocalResult:
        # No noise covers a loss: it stays at home.
        return replace(result, losses=torch.zeros_like(result.losses))
