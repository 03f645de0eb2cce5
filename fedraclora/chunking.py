"""How many clients train as one batch.

The chunk bounds memory: activations grow with it. On a CPU a larger chunk also stops paying once
its activations leave the cache. It is part of what fixes the bits of a run, so ``auto`` is
resolved once, from the model and the data alone, and stored.
"""

from __future__ import annotations

import torch
from torch import nn

from fedraclora.method import Downlink
from fedraclora.optimiser import LocalConfig
from fedraclora.task import Task, forward

LARGEST = 128
BUDGET_BYTES = {"cpu": 256 << 20, "cuda": 8 << 30}


def client_bytes(task: Task, downlink: Downlink, local: LocalConfig) -> int:
    """Estimate the memory that one more client in a chunk costs.

    Args:
        task: Model and data; one sample is passed through the model.
        downlink: What is trained: values, gradients and moments of each client.
        local: Batch size.

    Returns:
        Bytes: outputs of all layers for one batch, kept for the backward pass, and four copies
        of the trained tensors.
    """
    client = torch.zeros(1, dtype=torch.int64, device=task.test.target.device)
    sample = task.train.gather(client, client[:, None])
    outputs: list[int] = []

    def count(_: nn.Module, __: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.numel() * output.element_size())

    leaves = [m for m in task.model.modules() if not list(m.children())]
    hooks = [m.register_forward_hook(count) for m in leaves]
    was_training = task.model.training
    with torch.no_grad():
        forward(task.model.eval(), sample.inputs)
    task.model.train(was_training)
    for hook in hooks:
        hook.remove()
    trained = sum(torch.Size(s.shape).numel() for s in downlink.trained().values())
    return sum(outputs) * (local.batch_size or 32) + 4 * 4 * trained


def resolve_chunk(
    chunk: int | str, task: Task, downlink: Downlink, local: LocalConfig, cohort: int
) -> int:
    """Turn ``engine.chunk`` into a number of clients.

    Args:
        chunk: A number, or ``auto``.
        task: Model and data.
        downlink: A round's downlink.
        local: Local settings.
        cohort: Clients per round, the most a chunk can hold.

    Returns:
        Clients per chunk.
    """
    if isinstance(chunk, int):
        return min(chunk, cohort)
    budget = BUDGET_BYTES[task.test.target.device.type]
    fits = budget // max(1, client_bytes(task, downlink, local))
    return max(1, min(fits, LARGEST, cohort))
