"""One part of each kind, as docs/own.md has them: copy what you need."""
# ruff: noqa: ARG002, D101, D103
# mypy: allow-untyped-defs, allow-untyped-calls, disable-error-code="override, explicit-override"

from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from torchmetrics import AUROC

import fedraclora
from fedraclora import ClientProgram, RoundStep
from fedraclora.attacks import Attack
from fedraclora.protocol.method import Traits
from fedraclora.protocol.program import GradientStage
from fedraclora.strategies.shared.layerwise import LayerMethod, LayerUpdate


def net(shape, classes):
    return nn.Sequential(nn.Linear(*shape, 16), nn.Tanh(), nn.Linear(16, classes))


def samples(client):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(client))
    return x, (x[:, 0] > 0).long()


def patients(client):  # of one owner's CSV, on its node; means and deviations are agreed on before
    table = pd.read_csv(f"/srv/records/{client}.csv")
    means, deviations = {"age": 52.0, "marker": 1.3}, {"age": 17.0, "marker": 0.4}
    x = (table[[*means]] - pd.Series(means)) / pd.Series(deviations)
    return x.to_numpy("float32"), (table["outcome"] == "ill").to_numpy("int64")


def train(round):
    model = round.install(net((6,), 2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs, target = round.data
    loss = nn.functional.cross_entropy(model(inputs), target)
    loss.backward()
    optimizer.step()
    return round.read(model, samples=len(target), steps=1, loss=loss.item())


def focal(output, target, gamma=2.0):  # Lin et al., 2017, arXiv 1708.02002
    log = output.log_softmax(dim=1).gather(1, target[:, None])[:, 0]
    return -((1 - log.exp()) ** gamma) * log


focal.like = "cross_entropy"  # how targets and outputs are read, for metrics and predictions

area = AUROC(task="multiclass", num_classes=2)


def misses(output, target):
    return (output.argmax(dim=1) != target).float()


wrong = fedraclora.Metric(misses, higher_is_better=False, each=True, name="wrong")


@dataclass(frozen=True)
class Decay(ClientProgram):
    rate: float = 0.1
    form = "decay={rate}"  # its name in the first lines of a run

    def hooks(self, chunk):
        def pull(gradients, values):
            return {name: gradients[name] + self.rate * values[name] for name in gradients}

        return {GradientStage.LOSS: pull}


class Asked(RoundStep):
    def __init__(self, unit: int = 1):
        self.unit = unit

    def columns(self, exchange, uplinks):
        return {"asked_clients": len(exchange.first.cohort.clients) / self.unit}


def tilted(*, angle: float = 0.0):
    x = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] + angle * x[:, 1] > 0).long()
    return list(zip(x.split(40), y.split(40), strict=True))


@dataclass(frozen=True)
class OneSketch(LayerMethod):
    """B trains under one A for the whole run."""

    kind: str = "gaussian"
    traits = Traits(exact=True, linear=True, merges=False)
    link_rounds = None

    def factors(self, layer, now):
        frozen = now.sketch(layer, "A", self.kind, index=0, normalize="rows")
        return {"B": layer.trained("B"), "A": frozen}

    def update(self, layer, replies):
        return LayerUpdate(carried={"B": replies.mean("B")})


def by_size(data, *, clients, seed, growth: float = 2.0):
    sizes = torch.tensor([growth**k for k in range(clients)])
    cuts = (sizes.cumsum(0) / sizes.sum() * len(data.train)).long()
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    return torch.tensor_split(rows, cuts[:-1])


@dataclass(frozen=True)
class Louder(Attack):
    times: float = 10.0

    def sent(self, updates, clients, key):
        return self.times * updates
