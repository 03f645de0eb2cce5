"""Gradients that are written out, against autograd on the same chunk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES, SLOPES, Task
from fedraclora.protocol.factor import Factor, to_train
from fedraclora.protocol.method import Adapter, RoundInstructions
from fedraclora.protocol.plan import make_plan
from fedraclora.training import feedforward
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.feedforward import THIN, FeedForward, written_out
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.program import OpenChunk, written_out_gradients
from fedraclora.tree import Tree
from tests.common import normal

SIZES = (5, 9, 3, 7)
CLIENTS = torch.arange(len(SIZES))
WIDE = THIN + 3
OUTPUTS = {"cross_entropy": 4, "squared_error": 4, "logistic": 1}


def layers(outputs: int = 4) -> OrderedDict[str, nn.Module]:
    """Both kinds of layers, wide and thin, with and without biases."""
    return OrderedDict(
        flatten=nn.Flatten(),
        fc1=nn.Linear(6, WIDE),
        relu=nn.ReLU(),
        fc2=nn.Linear(WIDE, 5, bias=False),
        tanh=nn.Tanh(),
        same=nn.Identity(),
        fc3=nn.Linear(5, outputs),
    )


def shape_of(name: str, outputs: int) -> tuple[int, ...]:
    return tuple(nn.Sequential(layers(outputs)).get_parameter(name).shape)


def task(loss: str = "cross_entropy") -> Task:
    """Seven layers in float64, four clients of unlike sizes."""
    model = nn.Sequential(layers(OUTPUTS[loss])).double()
    for name, parameter in model.named_parameters():
        parameter.data = 0.5 * normal(*parameter.shape, key=name)
    x = normal(sum(SIZES), 2, 3)
    target = {
        "cross_entropy": torch.arange(len(x)) % 4,
        "squared_error": normal(len(x), 4, key="y"),
        "logistic": torch.arange(len(x)) % 2,
    }[loss]
    samples = Samples({"x": x}, target)
    parts = np.split(np.arange(len(x)), np.cumsum(SIZES)[:-1])
    return Task(model, ("fc3",), loss, ("loss",), PartitionedData.of(samples, parts), samples)


def pair(weight: str, trained: str, outputs: int, *, per_client: bool = False) -> Adapter:
    """A low-rank term with scale 1.5, of which A, B or both are trained from a start."""
    m, n = shape_of(weight, outputs)
    factors: dict[str, torch.Tensor | Factor] = {}
    for label, shape in {"B": (m, 2), "A": (2, n)}.items():
        value = normal(*shape, key=f"{weight}{label}")
        own = normal(len(SIZES), *shape, key=f"{weight}{label}")
        if label in trained:
            factors[label] = to_train(shape, start=value)
        else:
            factors[label] = own if per_client else value
    return Adapter.of(factors, 1.5)


def pairs(trained: str, outputs: int, *, per_client: bool = False) -> dict[str, Adapter]:
    names = (f"fc{i}.weight" for i in (1, 2, 3))
    return {n: pair(n, trained, outputs, per_client=per_client) for n in names}


def dense(outputs: int, *names: str) -> dict[str, Factor]:
    return {n: to_train(shape_of(n, outputs)) for n in names}


DOWNLINKS: dict[str, Callable[[int], RoundInstructions]] = {
    "B": lambda k: RoundInstructions(pairs("B", k)),
    "A": lambda k: RoundInstructions(pairs("A", k)),
    "both": lambda k: RoundInstructions(pairs("AB", k)),
    "own A": lambda k: RoundInstructions(pairs("B", k, per_client=True)),
    "own B": lambda k: RoundInstructions(pairs("A", k, per_client=True)),
    "with biases": lambda k: RoundInstructions(pairs("B", k), dense(k, "fc1.bias", "fc3.bias")),
    "with a head": lambda k: RoundInstructions(
        {"fc2.weight": pair("fc2.weight", "B", k)}, dense(k, "fc3.weight")
    ),
    "last alone": lambda k: RoundInstructions({"fc3.weight": pair("fc3.weight", "B", k)}),
    "middle alone": lambda k: RoundInstructions({"fc2.weight": pair("fc2.weight", "AB", k)}),
    "everything": lambda k: RoundInstructions(
        {}, dense(k, "fc1.weight", "fc1.bias", "fc2.weight", "fc3.weight")
    ),
    "one bias": lambda k: RoundInstructions({}, dense(k, "fc1.bias")),
}


def opened(loss: str, downlink: RoundInstructions) -> tuple[CohortTrainer, OpenChunk]:
    whole = task(loss)
    plan = make_plan(whole.model, whole.head, head_policy="lora")
    local = LocalConfig(lr=0.5, batch_size=4, shuffle=False)
    trainer = CohortTrainer(whole, plan, local, seed=1, device=torch.device("cpu"))
    base = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    return trainer, trainer.open(base, downlink, CLIENTS, round_=1)


@pytest.mark.parametrize("loss", sorted(SLOPES))
@pytest.mark.parametrize("case", DOWNLINKS)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_gradients_are_those_of_autograd(case: str, loss: str, step: int) -> None:
    trainer, chunk = opened(loss, DOWNLINKS[case](OUTPUTS[loss]))
    assert chunk.network is not None
    for value in chunk.values.values():  # away from the common start
        value.add_(normal(*value.shape, key="moved"), alpha=0.3)
    batch = chunk.schedule.plan(None)[step]
    leaves = chunk.leaves(batch[0])
    wanted = trainer.losses(chunk, leaves, step, batch)
    slopes = torch.autograd.grad(wanted.sum(), list(leaves.values()))
    network, whole = chunk.network, trainer.task
    found, gradients = written_out_gradients(network, whole, chunk, leaves, step, batch)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-14)
    assert list(gradients) == list(leaves)
    for (name, gradient), slope in zip(gradients.items(), slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-13, msg=name)


def test_weights_that_take_their_steps_at_once_take_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trained(large: int) -> Tree:
        monkeypatch.setattr(feedforward, "LARGE", large)
        monkeypatch.setattr(feedforward, "ALIGNED", 1)
        loss = min(SLOPES)
        sent = DOWNLINKS["everything"](OUTPUTS[loss])
        trainer, chunk = opened(loss, sent)
        base = chunk.program.base
        return trainer.train(base, sent, CLIENTS, round_=1, rate_scale=1.0).trained

    one, other = trained(1), trained(1 << 40)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-12, atol=1e-13, msg=name)


@pytest.mark.parametrize("loss", sorted(SLOPES))
def test_the_slope_of_a_loss_is_its_derivative(loss: str) -> None:
    whole = task(loss)
    output = (3 * normal(len(whole.test), OUTPUTS[loss], key="output")).requires_grad_()
    losses, _ = LOSSES[loss](output, whole.test.target)
    (wanted,) = torch.autograd.grad(losses.sum(), output)
    again, slope = SLOPES[loss](output.detach(), whole.test.target)
    torch.testing.assert_close(again, losses.detach())
    torch.testing.assert_close(slope, wanted)


def test_cross_entropy_of_large_logits_is_finite() -> None:
    output = torch.tensor([[1e4, -1e4], [1e4, -1e4]])
    losses, slope = SLOPES["cross_entropy"](output, torch.tensor([0, 1]))
    assert losses.tolist() == [0.0, 2e4]
    assert slope.tolist() == [[0.0, 0.0], [1.0, -1.0]]


class Odd(nn.Sequential):
    """A sequence that may do anything in its forward."""


def refused() -> dict[str, Task]:
    plain = task()
    x = plain.test.inputs["x"]
    shared, left, right = nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 4)
    right.bias = left.bias

    def model(*layers: nn.Module) -> Task:
        named = OrderedDict((f"fc{i}", layer) for i, layer in enumerate(layers, start=1))
        return replace(plain, model=nn.Sequential(named))

    return {
        "a subclass": replace(plain, model=Odd(layers())),
        "a layer unknown here": model(nn.Flatten(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4)),
        "a layer twice": model(nn.Flatten(), nn.Linear(6, 6), shared, nn.Linear(6, 4), shared),
        "a bias of two layers": model(nn.Flatten(), left, right),
        "another flattening": model(nn.Flatten(0, 1), nn.Linear(3, 4)),
        "tokens of vectors": model(nn.Linear(3, 4)),
        "another loss": replace(plain, loss="next_token"),
        "two inputs": replace(plain, test=Samples({"x": x, "y": x}, plain.test.target)),
    }


@pytest.mark.parametrize("what", refused())
def test_what_does_not_fit_is_left_to_autograd(what: str) -> None:
    assert written_out(task(), DOWNLINKS["B"](4))
    assert not written_out(refused()[what], RoundInstructions())


def test_a_chain_of_three_factors_is_left_to_autograd() -> None:
    core = {"B": normal(5, 2), "R": to_train((2, 2)), "A": normal(2, WIDE)}
    assert not written_out(task(), RoundInstructions({"fc2.weight": Adapter.of(core, 1.0)}))  # type: ignore[arg-type]


def test_mixed_precision_is_left_to_autograd() -> None:
    whole = task()
    whole = replace(whole, model=whole.model.float(), train=whole.train.to("cpu", torch.float32))
    plan = make_plan(whole.model, whole.head, head_policy="lora")
    base = {n: p.detach().clone() for n, p in whole.model.named_parameters()}
    for precision, written in (("float32", True), ("bf16-mixed", False)):
        trainer = CohortTrainer(
            whole,
            plan,
            LocalConfig(lr=0.5, batch_size=4),
            seed=1,
            device=torch.device("cpu"),
            precision=precision,
        )
        network = trainer.open(base, DOWNLINKS["B"](4), CLIENTS, round_=1).network
        assert isinstance(network, FeedForward) == written
