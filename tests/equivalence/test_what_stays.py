"""Factors that stay at the clients, and clients that diverge while they hold something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from fedraclora.clients.worker import Worker
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, RoundInstructions
from fedraclora.protocol.plan import make_plan
from fedraclora.rng import generator, torch_normal
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.weights.update import BaseWeights
from fedraclora.wire.answers import Answer, TrainedAnswer
from fedraclora.wire.exchange import Ask, TrainRequest

CLIENTS = torch.tensor([0, 1, 2])


@dataclass(frozen=True)
class Bench:
    """A worker over three clients of a linear model, and the downlink of a FedSA-like round."""

    worker: Worker
    downlink: RoundInstructions

    def round(self, number: int) -> Answer:
        request = TrainRequest(number, 0, 1.0, CLIENTS)
        return self.worker.train(Ask(request, self.downlink))

    def held(self, round_: int) -> torch.Tensor:
        default = {"weight/B": torch.zeros(2, 2, dtype=torch.float64)}
        return self.worker.store.read(CLIENTS, round_, default)["weight/B"]


def make_bench(poison: int | None = None, **local: float) -> Bench:
    rng = generator(0, "test")
    model = nn.Linear(5, 2, bias=False).double()
    x, y = torch_normal(rng, 12, 5), torch_normal(rng, 12, 2)
    if poison is not None:
        x[4 * poison] = float("nan")
    data = PartitionedData.of(Samples({"x": x}, y), [np.arange(4 * k, 4 * k + 4) for k in range(3)])
    task = Task(model, (), "squared_error", ("loss",), data, data.samples)
    plan = make_plan(model, (), head_policy="lora")
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = LocalSettings(lr=0.1, batch_size=0, **local)  # type: ignore[arg-type]
    trainer = CohortTrainer(task, plan, settings, seed=0, device=torch.device("cpu"))
    factors = {"B": to_train((2, 2), upload=False), "A": to_train((2, 5), torch_normal(rng, 2, 5))}
    downlink = RoundInstructions({"weight": Adapter.of(dict(factors), 1.5)})
    return Bench(Worker(trainer, BaseWeights(base)), downlink)


def test_a_factor_that_stays_goes_on_where_its_client_left_off() -> None:
    bench = make_bench()
    bench.round(1)
    first = bench.held(2)
    assert first.abs().max() > 0
    assert not torch.equal(first[0], first[1])
    bench.round(2)
    assert not torch.equal(bench.held(3), first)
    assert torch.equal(bench.held(2), first)


def test_a_factor_that_stays_does_not_travel() -> None:
    bench = make_bench()
    answer = bench.round(1)
    assert isinstance(answer, TrainedAnswer)
    assert answer.layout == bench.downlink.layout
    assert answer.shape == (3, 10)


def test_a_client_that_diverged_keeps_what_it_had() -> None:
    bench = make_bench(poison=1)
    bench.round(1)
    held = bench.held(2)
    assert torch.isfinite(held).all()
    assert held[1].abs().max() == 0
    assert held[0].abs().max() > 0


def test_an_impossible_setting_is_nobodys_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()

    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("local.lr=0.1: expected another value")

    monkeypatch.setattr(bench.worker.trainer, "train", refuse)
    with pytest.raises(ConfigError, match=r"local\.lr=0\.1"):
        bench.round(1)
