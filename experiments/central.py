"""The physical limit: one low-rank adapter trained on the samples of the whole cohort."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from experiments.workloads import Workload
from fedraclora.adapter import make_plan
from fedraclora.task import LOSSES, Task, forward


class LowRankLinear(nn.Module):
    """A frozen linear layer with one low-rank term, B trained and A frozen."""

    def __init__(self, inner: nn.Linear, rank: int) -> None:
        super().__init__()
        self.inner = inner
        m, n = inner.weight.shape
        rank = min(rank, n)
        self.A = (
            torch.linalg.qr(torch.ones(n, rank) + torch.eye(n, rank))[0]
            .T.contiguous()
            .to(inner.weight)
        )
        self.B = nn.Parameter(inner.weight.new_zeros(m, rank))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, ..., in] to [N, ..., out]."""
        out: torch.Tensor = self.inner(x)
        return out + F.linear(F.linear(x, self.A), self.B)


def central_round(workload: Workload, task: Task, clients_at_once: int) -> None:
    """Train one adapter for as many steps as a client takes, each on every client's batch.

    Args:
        workload: Rank, batch and steps.
        task: The model and the data of all clients.
        clients_at_once: Samples of this many clients go through the model at a time; gradients
            of a step are added up.
    """
    plan = make_plan(task.model, task.head, head_policy="adapt")
    model = copy.deepcopy(task.model).requires_grad_(requires_grad=False).eval()
    for name in plan.targets:
        owner = name.rpartition(".")[0]
        parent, _, leaf = owner.rpartition(".")
        inner = model.get_submodule(owner)
        if isinstance(inner, nn.Linear):
            setattr(model.get_submodule(parent), leaf, LowRankLinear(inner, workload.rank))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1)
    clients = torch.arange(task.train.num_clients, device=task.test.target.device)
    for step in range(workload.steps):
        optimiser.zero_grad()
        for part in clients.split(clients_at_once):
            places = torch.arange(workload.batch, device=clients.device) + step * workload.batch
            batch = task.train.gather(part, places.expand(len(part), -1))
            losses, _ = LOSSES[task.loss](forward(model, batch.inputs), batch.target)
            (losses.sum() / len(clients)).backward()
        optimiser.step()
