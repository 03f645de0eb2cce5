"""Features whose runs are interrupted: each is a small job that takes a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

import fedraclora
from fedraclora.aggregation.base import rows_of, starts
from fedraclora.client import Round, Trained
from fedraclora.models.built import seeded
from tests.common import normal

JOB = [
    "rounds=4",
    "clients_per_round=3",
    "method.rank=2",
    "pretrain=none",
    "output=run",
    "output.plots=false",
    "output.progress=false",
    "output.checkpoint_every=2",
    "device=cpu",
    "engine.chunk=8",
]
NUMBERS = [
    "data=least_squares",
    "data.clients=5",
    "data.features=8",
    "data.outputs=6",
    "data.labels=null",
    "clients=null",
    "partition=given",
    "model=linear",
    "local.lr=0.05",
]
CLASSES = [
    "data=digits",
    "data.labels=null",
    "partition=iid",
    "clients=5",
    "model.hidden=[6]",
    "local.lr=0.05",
    "local.batch_size=128",
]
STATE = "local.optimizer_state"


@dataclass(frozen=True)
class Feature:
    """What a run has besides.

    Attributes:
        words: Its arguments of `fedraclora.simulate`.
        given: Makes its objects, anew for each run.
        of: The job that it is a feature of.
    """

    words: tuple[str, ...] = ()
    given: Callable[[], dict[str, Any]] = dict
    of: tuple[str, ...] = tuple(NUMBERS)

    def run(self, folder: Path, **more: Any) -> fedraclora.RunResult:
        """Run it in a folder, or resume it there."""
        words = [*self.of, *JOB, *self.words]
        return fedraclora.simulate(*words, folder=folder, resume=True, **self.given(), **more)


class Cosine(fedraclora.RoundStep):
    """Counts, in a number of its own, and writes a column."""

    individuals = True
    first = True
    cosine = 0.0

    @override
    def treat(self, uplinks: Any, context: Any) -> Any:
        units = nn.functional.normalize(rows_of(uplinks) - starts(context, uplinks), dim=1)
        self.cosine = float((units @ units.mT).mean())
        return uplinks

    @override
    def columns(self, exchange: Any, uplinks: Any) -> dict[str, object]:
        return {"cosine": self.cosine}


def net() -> nn.Module:
    with seeded(0, "model"):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = normal(count, 4, seed=seed).float()
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def distances(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - nn.functional.one_hot(target, 3)).square().sum(dim=1)


def train(round_: Round) -> Trained:
    """A client that trains once more each time that it is asked, with noise of its own."""
    x, y = round_.data
    model = round_.install(net())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.2)
    round_.state["times"] = times = round_.state.get("times", 0) + 1
    for _ in range(times):
        loss = nn.functional.cross_entropy(model(x) + torch.rand(()), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return round_.read(model, samples=len(y), steps=times, loss=loss.item())


def own(**more: Any) -> dict[str, Any]:
    """A model and samples of a program's own."""
    data = [samples(6 + k, k) for k in range(5)]
    return {"model": net(), "data": data, "test": samples(9, 9), **more}


BITS = ("compression.uplink=int8", "compression.downlink=int4", "compression.feedback=true")
ROTATED = ("compression.uplink=eden2", "compression.downlink=eden2")
ADAM = ("local=adamw", "local.lr=0.02")
VARIATES = ("control_variates=true", "local.steps=2")
ROUGH = ("system=phones", "system.drop_out=0.2")
BUFFER = ("system=buffered", "system.buffer=2", "system.drop_out=0.2")
NOISE = ("privacy=client_level", "privacy.delta=0.01", "aggregation_weights=uniform")
HETERO = ("allocation=heterolora", "allocation.share=0.5", "allocation.every=2")
ADALORA = ("allocation=adalora", "allocation.target=1", "allocation.begin=1", "allocation.end=3")

VALIDATION = ("evaluate.split=validation", "data.validation=0.2")

# Each method by its defaults is resumed in the contract suite.
FEATURES: dict[str, Feature] = {
    "carried": Feature(("method=fed_rac_lora", "method.merge_every=3")),
    "left cover": Feature(("method=fed_rac_lora", "method.train=A", "method.blocks=cover")),
    "pool": Feature(("method=pool_rac_lora", "method.pool=2", "method.refresh=4")),
    "basis of the last": Feature(("method=subspace_rac_lora", "method.merge_every=1")),
    "principal start": Feature(("method=fedex_lora", "method.init=pissa")),
    "start by gradients": Feature(("method=fedex_lora", "method.init=lora_ga")),
    "momentum": Feature(("local=momentum", "local.schedule=cosine")),
    "moments": Feature(("method=cola", *ADAM, f"{STATE}=run")),
    "moments of a link": Feature(
        ("method=cola", *ADAM, f"{STATE}=merge", f"{STATE}_kept=0.1", "method.merge_every=3")
    ),
    "moments of groups": Feature(
        ("method=fed_rac_lora", *ADAM, f"{STATE}=run", "method.sketches=2", "method.merge_every=3")
    ),
    "projected moments": Feature(("method=galore_average", *ADAM, f"{STATE}=run", "method.gap=3")),
    "moments of rows": Feature(("method=subspace_rac_lora", *ADAM, f"{STATE}=rows")),
    "scaled bits": Feature(("method=ffa_lora", *BITS)),
    "scaled bits of a link": Feature(("method=fed_rac_lora", *BITS, "method.merge_every=3")),
    "scaled bits of a pool": Feature(("method=pool_rac_lora", *BITS, "method.refresh=4")),
    "rotated bits": Feature(("method=fed_rac_lora", *ROTATED)),
    "rotated bits of a pool": Feature(("method=pool_rac_lora", *ROTATED, "method.refresh=4")),
    "coded bits": Feature(("method=fedavg_lora", *BITS, "compression.downlink_coding=zstd")),
    "server momentum": Feature(("method=fed_rac_lora", "server_optimizer=momentum")),
    "momentum of factors": Feature(
        ("method=fedavg_lora", "server_optimizer=momentum", "server_optimizer.space=factors")
    ),
    "server adam": Feature(("method=fedavg_lora", "server_optimizer=adam")),
    "server adagrad": Feature(("method=fed_rac_lora", "server_optimizer=adagrad")),
    "server yogi": Feature(("method=fed_rac_lora", "server_optimizer=yogi")),
    "control variates": Feature(("method=ffa_lora", *VARIATES)),
    "variates of both": Feature(("method=fedavg_lora", *VARIATES, "server_optimizer=momentum")),
    "magnitudes": Feature(("method=fedavg_lora", "dora=true")),
    "magnitudes of clients": Feature(("method=fedsa_lora", "dora=true")),
    "chosen layers": Feature(("method=fed_rac_lora", "model=mlp", *HETERO), of=tuple(CLASSES)),
    "falling ranks": Feature(("method=fedex_lora", *ADALORA)),
    "devices": Feature(("method=fed_rac_lora", *ROUGH, "data.clients=40", "clients_per_round=12")),
    "ranks of devices": Feature(("method=hetlora", "system=mixed_ranks")),
    "buffer": Feature(("method=fed_rac_lora", *BUFFER)),
    "buffer with momentum": Feature(("method=fedavg_lora", *BUFFER, "server_optimizer=momentum")),
    "buffer in bits": Feature(("method=ffa_lora", *BUFFER, *BITS)),
    "noise": Feature(("method=ffa_lora", *NOISE, "privacy.clip=1.0")),
    "noise and its clip": Feature(
        ("method=fed_rac_lora", *NOISE, "privacy.quantile=0.5", "privacy.count_noise=1.5")
    ),
    "noise of samples": Feature(("method=fed_rac_lora", "local=dp_sgd"), of=tuple(CLASSES)),
    "secure sums": Feature(("method=fed_rac_lora", "secure=secagg", "aggregation_weights=uniform")),
    "median": Feature(("method=fed_rac_lora", "aggregator=median", "attack=sign_flip")),
    "gates": Feature(("method=fed_rac_lora", "local.gate_penalty=0.01")),
    "personal heads": Feature(("method=fedavg_lora", "head=personal"), of=tuple(CLASSES)),
    "clients that measure": Feature(
        ("method=fedavg_lora", "evaluate.clients=all"), of=tuple(CLASSES)
    ),
    "patience": Feature(
        (
            "method=fed_rac_lora",
            "stop.patience=3",
            "stop.min_delta=9",
            "evaluate.split=validation",
            "data.validation=0.2",
        ),
        of=tuple(CLASSES),
    ),
    "step": Feature(("method=ffa_lora",), lambda: {"steps": [Cosine()]}),
    "own model": Feature((), own, of=("local.lr=0.1",)),
    "own loss": Feature(
        ("method=fed_rac_lora",), lambda: own(loss=distances), of=("local.lr=0.1",)
    ),
    "own training": Feature(
        ("method=fed_rac_lora", "engine.chunk=auto"), lambda: own(train=train), of=()
    ),
}
