"""The plain loop: FedAvg as one writes it by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fedraclora.data.task import Task, forward
from fedraclora.experiments.bench.workloads import LR, Workload


class PlainLoop:
    """One module, one optimiser per client, a running sum.

    Args:
        workload: Whose local work is done.
        task: The task of the workload.

    Attributes:
        state: The weights after the last round.
    """

    def __init__(self, workload: Workload, task: Task) -> None:
        self.workload, self.task = workload, task
        self.state = {n: p.detach().clone() for n, p in task.model.named_parameters()}

    def round(self) -> None:
        """Train every client in turn and average."""
        model, data = self.task.model.train(), self.task.train
        sums = {n: torch.zeros_like(t) for n, t in self.state.items()}
        device = next(model.parameters()).device
        places = torch.arange(self.workload.samples, device=device).split(self.workload.batch)
        for client in torch.arange(data.num_clients, device=device).split(1):
            model.load_state_dict(self.state)
            optimiser = torch.optim.SGD(model.parameters(), lr=LR)
            for place in places:
                batch = data.gather(client, place[None])
                optimiser.zero_grad()
                F.cross_entropy(forward(model, batch.inputs), batch.target).backward()
                optimiser.step()
            for name, value in model.named_parameters():
                sums[name] += value.detach()
        self.state = {n: t / data.num_clients for n, t in sums.items()}
