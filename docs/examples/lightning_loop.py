"""A LightningModule as the local training of every client.

A new `lightning.Trainer` in each round: a second `fit` of one would go on with its optimizer. It
writes no file, and `configure_optimizers` takes what is to be trained alone.

    python lightning_loop.py
"""

from __future__ import annotations

import logging

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fedraclora
from fedraclora.client import Round, Trained

STEPS, BATCH, TOGETHER, RATE = 6, 10, 2, 0.02
SILENT = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
QUIET = {"num_sanity_val_steps": 0, **dict.fromkeys(SILENT, False)}
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Classifier(lightning.LightningModule):
    """What there is already: a network, its loss and its optimizer."""

    def __init__(self, network: nn.Module, rate: float) -> None:
        super().__init__()
        self.network, self.rate, self.losses = network, rate, []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """Compute the loss of a batch."""
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Take what `Round.install` has made trainable, and nothing else."""
        wanted = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(wanted, lr=self.rate)


def network() -> nn.Module:
    """Build the model; `Round.install` brings its weights."""
    return nn.Sequential(nn.Linear(20, 32), nn.Dropout(0.1), nn.ReLU(), nn.Linear(32, 2))


def train(round: Round) -> Trained:
    """Train one client for one round."""
    model = Classifier(round.install(network()), RATE * round.rate_scale)
    lightning.seed_everything(round.seed, workers=True, verbose=False)  # dropout, order of samples
    steps = {"max_steps": STEPS, "max_epochs": -1, "accumulate_grad_batches": TOGETHER}
    trainer = lightning.Trainer(**steps, devices=1, deterministic=True, **QUIET)
    data = TensorDataset(*round.data)
    trainer.fit(model, DataLoader(data, BATCH, shuffle=True))
    loss = sum(model.losses) / len(model.losses)
    return round.read(model.network, samples=len(data), steps=trainer.global_step, loss=loss)


if __name__ == "__main__":
    x = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
    y, sizes = (x[:, 0] > 0).long(), [60, 140, 100, 100]
    *clients, test = zip(x.split(sizes), y.split(sizes), strict=True)
    run = fedraclora.simulate(
        model=network(), data=clients, test=test, train=train, method="fed_rac_lora", rounds=5
    )
    print(run.history[["loss", "accuracy"]])
