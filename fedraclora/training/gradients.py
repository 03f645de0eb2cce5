"""Gradients of a local step without autograd, and what the core does to any."""

from __future__ import annotations

import torch

from fedraclora.data.task import SLOPES, Task
from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.recipes import GradientHook
from fedraclora.training.feedforward import FeedForward
from fedraclora.training.program import OpenChunk
from fedraclora.training.schedule import StepBatch
from fedraclora.tree import Tree


def written_out_gradients(
    network: FeedForward, task: Task, chunk: OpenChunk, leaves: Tree, step: int, batch: StepBatch
) -> tuple[torch.Tensor, Tree]:
    """Compute mean losses, [active], and gradients, [active, ...] by name, without autograd.

    Those of weights that take their steps in here (`FeedForward.descend`) are left out.

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
    return loss, {n: gradients[n] for n in leaves if n in gradients}


def clip_per_client(gradients: Tree, largest: float, by: str = "all") -> Tree:
    """Scale each client's gradients to a norm of at most ``largest``, as new tensors.

    Args:
        gradients: [K, ...] by name.
        largest: The norm c. A departure from min(1, c / norm), by which papers write it: as in
            torch's ``clip_grad_norm_`` the factor is c / (norm + 1e-6).
        by: ``all``: the norm is that of all of them; ``layer``: each module has its own, over the
            factors of its weights and its bias.
    """
    squares: Tree = {}
    owners = {n: layer_of(n) if by == "layer" else "" for n in gradients}
    for name, gradient in gradients.items():
        square = gradient.reshape(gradient.shape[0], -1).square().sum(dim=1)
        before = squares.get(owners[name])
        squares[owners[name]] = square if before is None else before + square
    factors = {o: (largest / (s.sqrt() + 1e-6)).clamp(max=1.0) for o, s in squares.items()}
    return {
        n: g * factors[owners[n]].reshape(-1, *[1] * (g.dim() - 1)) for n, g in gradients.items()
    }


def layer_of(name: str) -> str:
    """Return the module to which a trained tensor belongs: ``fc`` for ``fc.weight/B``."""
    return name.partition("/")[0].rpartition(".")[0]


def correcting(sent: Downlink, order: torch.Tensor) -> GradientHook:
    """Build the hook that adds a round's corrections to the gradients.

    Args:
        sent: Has them, for all clients or [K, ...].
        order: Places of the clients in the order of the gradients, int64 [K]; those that still
            train come first.
    """
    slots = sent.trained()
    added = {
        n: t.to(order.device)[order] if t.dim() > len(slots[n].shape) else t.to(order.device)[None]
        for extra in sent.extras.values()
        for n, t in extra.items()
    }

    def hook(gradients: Tree) -> Tree:
        out = dict(gradients)
        for name, value in added.items():
            gradient = gradients[name]
            out[name] = gradient + value[: len(gradient)].to(gradient)
        return out

    return hook


def mean_gradients(start: Tree, end: Tree, steps: int, rates: dict[str, float]) -> Tree:
    """Average the directions of plain SGD steps: (start - end) / (steps rate), float64."""
    return {n: (start[n].double() - end[n].double()) / (steps * rates[n]) for n in end}
