"""Targets of which a sample has many, from a program and from files, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import fedraclora
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import Adapter, RoundInstructions
from fedraclora.protocol.plan import make_plan
from fedraclora.rng import generator, torch_normal
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig

torch.set_num_threads(1)
SIZES, LR, STEPS, SCALE = (5, 9, 2), 0.2, 3, 1.5
KINDS = ("multi_label", "pixel_classes", "squared_error")
Tensor = torch.Tensor


def normal(*shape: int, key: str) -> Tensor:
    return torch_normal(generator(0, "many targets", key), *shape)


class OverChannels(nn.Module):
    """Two linear layers over the channels of samples [N, C] or [N, C, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x.movedim(1, -1)))).movedim(-1, 1)


def net() -> nn.Module:
    model = OverChannels().double()
    for name, parameter in model.named_parameters():
        parameter.data = 0.5 * normal(*parameter.shape, key=name)
    return model


def samples(kind: str, count: int = sum(SIZES)) -> tuple[Tensor, Tensor]:
    wide = (2, 3) if kind == "pixel_classes" else ()
    x = normal(count, 4, *wide, key="x")
    target = normal(count, 3, key="y")
    if kind == "multi_label":
        target = (target > 0).double()
    if kind == "pixel_classes":
        target = torch.from_numpy(generator(1, "many targets").integers(0, 3, (count, 2, 3)))
        target[:, 0, 0], target[1] = -100, -100
    return x, target


def mean_loss(kind: str, output: Tensor, target: Tensor) -> Tensor:
    if kind == "multi_label":
        return F.binary_cross_entropy_with_logits(output, target)
    if kind == "pixel_classes":
        return F.cross_entropy(output, target)
    return 0.5 * (output - target).square().sum(dim=1).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_of_clients_trains_as_plain_torch(kind: str) -> None:
    model, (x, target) = net(), samples(kind)
    whole = Samples({"x": x}, target)
    parts = np.split(np.arange(len(x)), np.cumsum(SIZES)[:-1])
    task = Task(model, (), kind, ("loss",), PartitionedData.of(whole, parts), whole)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = ("fc1.weight", "fc2.weight")
    start = {n: 0.3 * normal(base[n].shape[0], 2, key=f"B {n}") for n in weights}
    frozen = {n: normal(2, base[n].shape[1], key=f"A {n}") for n in weights}
    adapters = {
        n: Adapter.of({"B": to_train(start[n].shape, start=start[n]), "A": frozen[n]}, SCALE)
        for n in weights
    }
    local = LocalConfig(lr=LR, steps=STEPS, batch_size=0, shuffle=False)
    plan = make_plan(model, (), head_policy="lora")
    trainer = CohortTrainer(task, plan, local, seed=1, device=torch.device("cpu"))
    found = trainer.train(
        base, RoundInstructions(adapters), torch.arange(3), round_=1, rate_scale=1.0
    )
    for client, rows in enumerate(parts):
        factors = {n: b.clone().requires_grad_() for n, b in start.items()}
        losses = []
        for _ in range(STEPS):
            merged = {n: base[n] + SCALE * factors[n] @ frozen[n] for n in weights}
            output = functional_call(model, merged, (x[rows],))
            loss = mean_loss(kind, output, target[rows])
            losses.append(float(loss.detach()))
            slopes = torch.autograd.grad(loss, list(factors.values()))
            for factor, slope in zip(factors.values(), slopes, strict=True):
                factor.data -= LR * slope
        for name, factor in factors.items():
            got = found.trained[f"{name}/B"][client]
            torch.testing.assert_close(got, factor.detach(), rtol=1e-10, atol=1e-12)
        assert float(found.losses[client]) == pytest.approx(sum(losses) / STEPS, rel=1e-10)


USUAL = {
    "multi_label": ["f1_micro", "f1_macro", "auc", "loss"],
    "pixel_classes": ["mean_iou", "accuracy", "loss"],
    "squared_error": ["loss"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_read_from_a_program_and_from_files(kind: str, tmp_path: Path) -> None:
    x, target = samples(kind, 40)
    numbers = {"x": x.float().numpy(), "target": target.numpy()}
    np.savez(tmp_path / "rows.npz", **numbers)
    for client in range(2):
        half = slice(20 * client, 20 * client + 20)
        np.savez(tmp_path / f"{client}.npz", **{n: a[half] for n, a in numbers.items()})
    words = ("output.progress=false", "rounds=1", "local.lr=0.1", "target_modules=all-linear")
    task = "regression" if kind == "squared_error" else kind
    sources: dict[str, dict[str, Any]] = {
        "program": {"data": [(numbers["x"], numbers["target"])], "loss": kind},
        "arrays": {
            "data": {"name": "arrays", "file": str(tmp_path / "rows.npz"), "task": task},
            "clients": 2,
        },
        "own": {"data": {"name": "own", "samples": str(tmp_path), "loss": kind}},
    }
    for name, keys in sources.items():
        run = fedraclora.simulate(*words, model=net().float(), **keys)
        metrics = run.rows[-1]["metrics"]
        assert [*metrics] == USUAL[kind], name
        found = run.evaluate((numbers["x"], numbers["target"]))
        with torch.no_grad():
            output = run.model()(torch.from_numpy(numbers["x"]))
        wanted = float(mean_loss(kind, output.double(), target))
        assert found["loss"] == pytest.approx(wanted, rel=1e-5), name
        said = run.predict(numbers["x"])["prediction"]
        if kind == "pixel_classes":
            assert said[0] == output[0].argmax(dim=0).tolist()
        elif kind == "squared_error":
            assert said[0] == pytest.approx(output[0].tolist(), rel=1e-5)
        else:
            assert said[0] == (output[0] > 0).nonzero().flatten().tolist()
        if name == "program":
            run.export(tmp_path / "out", "state_dict")
            card = (tmp_path / "out" / "README.md").read_text()
            assert f"| loss | {kind} (said) |" in card
            assert USUAL[kind][0] in card
