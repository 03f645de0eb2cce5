"""A setting of one's own joins local training, and no file of the core knows it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import override

from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, RoundInstructions
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.program import (
    ClientChunk,
    ClientProgram,
    Forward,
    GradientStage,
    Hook,
    LocalResult,
    Rates,
)
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimizer import CohortOptimizer
from fedraclora.tree import Tree
from tests.common import accepted, normal

LR, CLIP = 0.25, 0.01
CLIENTS = torch.arange(3)


@dataclass(frozen=True)
class Mine(LocalConfig):
    """Local settings with an extra."""

    mine: ClientProgram = field(default_factory=ClientProgram)

    @property
    @override
    def added(self) -> tuple[ClientProgram, ...]:
        return (self.mine,)


def train(local: LocalConfig, ranks: torch.Tensor | None = None) -> LocalResult:
    """One round of three clients of four samples, which train B of one layer, from zero."""
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    model[0].weight.data = normal(3, 5, key="W")
    samples = Samples({"x": normal(12, 5)}, normal(12, 3, key="y"))
    parts = np.split(np.arange(12), 3)
    task = Task(model, (), "squared_error", ("loss",), PartitionedData.of(samples, parts), samples)
    factors = {"B": to_train((3, 2)), "A": normal(2, 5, key="A")}
    downlink = RoundInstructions({"0.weight": Adapter.of(factors, 1.0)}, ranks=ranks)
    trainer = CohortTrainer(task, make_plan(model, ()), local, seed=0, device=torch.device("cpu"))
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    return trainer.train(base, downlink, CLIENTS, round_=1, rate_scale=1.0)


ONE = Mine(lr=LR, steps=1, batch_size=0)


class Signs(ClientProgram):
    """The sign of a gradient in its place."""

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        return {
            GradientStage.CLIP: lambda gradients, _: {n: g.sign() for n, g in gradients.items()}
        }


def test_a_hook_changes_the_gradients_that_the_optimizer_gets() -> None:
    plain, signs = (
        train(LocalConfig(lr=LR, steps=1, batch_size=0)),
        train(replace(ONE, mine=Signs())),
    )
    wanted = LR * plain.trained["0.weight/B"].sign()
    assert torch.equal(signs.trained["0.weight/B"], wanted)


class Listens(ClientProgram):
    """Keeps what the gradients are at every place."""

    def __init__(self) -> None:
        self.heard: dict[GradientStage, torch.Tensor] = {}

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        def at(when: GradientStage) -> Hook:
            def hear(gradients: Tree, values: Tree) -> Tree:
                assert list(gradients) == list(values)
                self.heard[when] = gradients["0.weight/B"]
                return gradients

            return hear

        return {when: at(when) for when in GradientStage}


def test_hooks_come_after_what_the_core_does_at_their_place() -> None:
    ears = Listens()
    train(replace(ONE, mine=ears, clip=CLIP), torch.tensor([2, 1, 1]))
    assert list(ears.heard) == list(GradientStage)
    whole, cut, clipped = (
        ears.heard[w] for w in (GradientStage.LOSS, GradientStage.BUDGET, GradientStage.CLIP)
    )
    assert whole[1:, :, 1].abs().min() > 0
    assert torch.count_nonzero(cut[1:, :, 1]) == 0
    assert torch.equal(cut[:, :, 0], whole[:, :, 0])
    assert clipped.flatten(1).norm(dim=1).max() <= CLIP < cut.flatten(1).norm(dim=1).min()


class Backwards(ClientProgram):
    """An optimizer that climbs."""

    @override
    def optimizer(self, chunk: ClientChunk, rates: Rates) -> CohortOptimizer:
        return CohortOptimizer(LocalConfig(lr=0.5), chunk.values, {n: -r for n, r in rates.items()})


def test_an_optimizer_takes_the_place_of_the_core_s() -> None:
    plain, up = train(ONE), train(replace(ONE, mine=Backwards()))
    assert torch.equal(up.trained["0.weight/B"], -plain.trained["0.weight/B"])


class Halved(ClientProgram):
    """Half the loss, by gradients of its own."""

    forms_gradients: ClassVar[bool] = True

    @override
    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        leaves = {n: v[:active].detach().requires_grad_() for n, v in chunk.values.items()}
        losses, counts, _ = forward(leaves, chunk.frozen)
        loss = 0.5 * losses.sum(dim=1) / counts.sum(dim=1)
        return loss, dict(
            zip(leaves, torch.autograd.grad(loss.sum(), [*leaves.values()]), strict=True)
        )


def test_gradients_of_its_own_stand_in_the_place_of_those_of_the_loss() -> None:
    plain, half = train(ONE), train(replace(ONE, mine=Halved()))
    torch.testing.assert_close(half.losses, plain.losses / 2)
    for name, value in plain.trained.items():
        torch.testing.assert_close(half.trained[name], value / 2)


@dataclass(frozen=True)
class Forgetful(ClientProgram):
    """Its moments end with the round."""

    share: float
    form: ClassVar[str] = "local.forgets={share}"
    ends_moments: ClassVar[bool] = True


def test_what_it_says_of_its_moments_is_heeded() -> None:
    with pytest.raises(ConfigError, match=r"kept after a round .*local\.forgets=0\.5"):
        accepted("local", Mine(momentum=0.5, optimizer_state="run", mine=Forgetful(0.5)))
