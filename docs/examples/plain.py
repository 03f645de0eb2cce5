"""A loop of your own in plain torch: mixup, two losses, gradient accumulation.

Mixup (Zhang et al., 2018, arXiv 1710.09412) mixes samples with each other, so that no loss belongs
to one of them; the second loss holds the outputs of an input and of a noisy copy together. Neither
can be said as a loss for each sample. The global generator of torch is seeded for each client and
round, so that the same seed gives the same bits.

    python plain.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedraclora
from fedraclora.client import Round, Trained

BATCH, TOGETHER = 10, 2  # samples of a batch, and batches whose gradients make a step
EPOCHS, RATE, ALPHA, NOISE, WEIGHT = 2, 0.3, 0.2, 0.1, 0.5


def network() -> nn.Module:
    """Build the model; `Round.install` brings its weights."""
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))


def train(round: Round) -> Trained:
    """Train one client for one round."""
    model = round.install(network())
    model.train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=RATE * round.rate_scale, momentum=0.9)
    data = TensorDataset(*round.data)
    batches = [batch for _ in range(EPOCHS) for batch in DataLoader(data, BATCH, shuffle=True)]
    losses, steps = [], 0
    for i, (x, y) in enumerate(batches, 1):
        loss = mixed(model, x, y) + WEIGHT * consistency(model, x)
        loss.backward()
        losses.append(loss.item())
        if i % TOGETHER == 0 or i == len(batches):
            # The last step may have fewer batches.
            for parameter in wanted:
                parameter.grad /= TOGETHER if i % TOGETHER == 0 else i % TOGETHER
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    mean = sum(losses) / len(losses)
    return round.read(model, samples=len(data), steps=steps, loss=mean)


def mixed(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of mixed samples, by the share of each."""
    share = float(torch.distributions.Beta(ALPHA, ALPHA).sample())
    other = torch.randperm(len(x))
    output = model(share * x + (1 - share) * x[other])
    return share * F.cross_entropy(output, y) + (1 - share) * F.cross_entropy(output, y[other])


def consistency(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean squared distance between the outputs of inputs and of noisy copies."""
    return F.mse_loss(model(x + NOISE * torch.randn_like(x)), model(x).detach())


if __name__ == "__main__":
    x = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(dim=1)
    sizes = [70, 180, 50, 200, 100]
    *clients, test = zip(x.split(sizes), y.split(sizes), strict=True)
    run = fedraclora.simulate(
        model=network(), data=clients, test=test, train=train, method="fed_rac_lora", rounds=8
    )
    print(run.history[["loss", "accuracy"]])
