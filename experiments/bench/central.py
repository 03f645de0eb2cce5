"""The yardstick: one low-rank adapter trained on the samples of the whole cohort."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from fedraclora.data.task import LOSSES, Task, forward
from fedraclora.data.token_losses import output_layer, token_losses
from fedraclora.experiments.bench.workloads import LR, Workload, plan_of
from fedraclora.training.program import copied_layers


class LowRankLinear(nn.Module):
    """A frozen linear layer with one low-rank term, B trained and A frozen."""

    def __init__(self, inner: nn.Linear, rank: int) -> None:
        super().__init__()
        self.inner = inner
        m, n = inner.weight.shape
        rank = min(rank, n)
        rows = torch.linalg.qr(torch.ones(n, rank) + torch.eye(n, rank))[0].T
        self.A = rows.contiguous().to(inner.weight)
        self.B = nn.Parameter(inner.weight.new_zeros(m, rank))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [N, ..., in] to [N, ..., out]."""
        out: torch.Tensor = self.inner(x)
        return out + F.linear(F.linear(x, self.A), self.B)


class Central:
    """One model with one adapter, trained for as many steps as a client takes.

    Args:
        workload: Rank, batch and steps.
        task: The model and the data of all clients.
        at_once: Samples of this many clients go through the model at a time; gradients of a
            step are added up.
    """

    def __init__(self, workload: Workload, task: Task, at_once: int) -> None:
        plan = plan_of(task)
        model = copied_layers(task.model).requires_grad_(requires_grad=False).eval()
        for name in plan.targets:
            owner = name.rpartition(".")[0]
            inner = model.get_submodule(owner)
            if isinstance(inner, nn.Linear):
                model.set_submodule(owner, LowRankLinear(inner, workload.rank))
        self.workload, self.task, self.model, self.at_once = workload, task, model, at_once
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def round(self) -> None:
        """Start from B = 0 and take the steps, each on one batch of every client."""
        workload, data = self.workload, self.task.train
        optimiser = torch.optim.SGD(self.trained, lr=LR)
        clients = torch.arange(data.num_clients, device=self.trained[0].device)
        with torch.no_grad():
            for factor in self.trained:
                factor.zero_()
        for step in range(workload.steps):
            optimiser.zero_grad()
            for part in clients.split(self.at_once):
                places = torch.arange(workload.batch, device=clients.device) + step * workload.batch
                batch = data.gather(part, places.expand(len(part), -1)).trim()
                if (head := output_layer(self.model, self.task.loss)) is not None:
                    losses, _ = token_losses(self.model, head, batch, self.trained[0].dtype)
                else:
                    outputs = forward(self.model, batch.inputs)
                    losses, _ = LOSSES[self.task.loss](outputs, batch.target)
                (losses.sum() / (len(clients) * workload.batch)).backward()
            optimiser.step()
