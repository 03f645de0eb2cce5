"""Two ways to the gradients of a local step beside plain autograd, and their clipping."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedraclora.data.task import SLOPES, Task
from fedraclora.privacy.sample_level import SampleNoise, answer_keys
from fedraclora.protocol.rank_budgets import cut_gradients
from fedraclora.training.feedforward import FeedForward
from fedraclora.training.program import OpenChunk
from fedraclora.training.schedule import Batch
from fedraclora.tree import Tree

Forward = Callable[
    [OpenChunk, Tree, Tree, int, Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]
]


def written_out_gradients(
    network: FeedForward, task: Task, chunk: OpenChunk, leaves: Tree, step: int, batch: Batch
) -> tuple[torch.Tensor, Tree]:
    """Give mean losses, [active], and gradients, [active, ...] by name, without autograd.

    Args:
        network: Of the chunk.
        task: Its loss and client data.
        chunk: Of `CohortTrainer.open`.
        leaves: What is trained, of the active clients.
        step: The local step, from 0.
        batch: Of `Schedule.plan`.
    """
    with torch.no_grad():
        samples, valid = chunk.samples(task.train, step, batch)
        output = network.forward(samples.inputs["x"], leaves, batch.active)
        losses, slope = SLOPES[task.loss](output, samples.target)
        share = valid.to(losses.dtype)
        share = share / share.sum(dim=1, keepdim=True)
        gradients = network.backward(slope.mul_(share.reshape(-1, 1)))
        loss = (losses.reshape(share.shape) * share).sum(dim=1)
    return loss, {n: gradients[n] for n in leaves}


def noisy_gradients(
    forward: Forward,
    dp: SampleNoise,
    chunk: OpenChunk,
    step: int,
    batch: Batch,
    masks: Tree,
    key: bytes,
) -> tuple[torch.Tensor, Tree]:
    """Give the same with every sample's gradient clipped, and noise on their sum.

    For a while every sample is a client of its own: what is trained is repeated for each, and so
    has a gradient for each.

    Args:
        forward: Gives loss and count of each sample, and whether it is one, [active, width].
        dp: Clip and noise.
        chunk: Of `CohortTrainer.open`.
        step: The local step, from 0.
        batch: As above.
        masks: What of a tensor its client trains (`fedraclora.protocol.rank_budgets.trainable`).
        key: Of the noise (`fedraclora.privacy.sample_level.answer_keys`).
    """
    active, width = batch.active, batch.width

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[:active].repeat_interleave(width, dim=0)

    leaves = {n: apart(v).detach().requires_grad_() for n, v in chunk.values.items()}
    frozen = {n: apart(f) if f.dim() == 3 else f for n, f in chunk.frozen.items()}
    losses, counts, valid = forward(chunk, leaves, frozen, step, batch)
    each = (losses / counts.clamp(min=1)) * valid.to(losses.dtype)
    found = torch.autograd.grad(each.sum(), list(leaves.values()))
    own = dict(zip(leaves, found, strict=True))
    own = cut_gradients(own, {n: apart(mask) for n, mask in masks.items()})
    like = {n: v[:active] for n, v in chunk.values.items()}
    keys = answer_keys(key, chunk.program.context.round_, chunk.clients[:active])
    noise = dp.noise(like, keys, step)
    total = (losses.detach() * valid).sum(dim=1) / (counts * valid).sum(dim=1).clamp(min=1)
    return total, dp.gradients(own, valid, noise)


def clip_per_client(gradients: Tree, largest: float) -> Tree:
    """Give each client's gradients scaled to a global norm of at most ``largest``, as new tensors.

    Args:
        gradients: [K, ...] by name.
        largest: The norm; the small constant of torch's ``clip_grad_norm_`` is kept.
    """
    squares = sum(g.reshape(g.shape[0], -1).square().sum(dim=1) for g in gradients.values())
    if not isinstance(squares, torch.Tensor):
        return gradients
    factor = (largest / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    return {n: g * factor.reshape(-1, *[1] * (g.dim() - 1)) for n, g in gradients.items()}
