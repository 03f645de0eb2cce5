"""Chain methods of one client against plain loops on torch.optim, written out per method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import override

from fedraclora.clients.engines import in_process
from fedraclora.compose.choices import choice
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ClientError
from fedraclora.protocol.link import Plan
from fedraclora.protocol.method import Cohort, Draw, Method, RoundInstructions, State
from fedraclora.protocol.plan import make_plan
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree

SEED, RANK, ALPHA, SIZE, BATCH = 5, 2, 3.0, 11, 4
ADAMW = LocalConfig(optimizer="adamw", lr=0.05, weight_decay=0.1, batch_size=BATCH, shuffle=False)
MOMENTUM = LocalConfig(lr=0.1, momentum=0.8, batch_size=BATCH, shuffle=False)
SHAPES = {"fc1.weight": (6, 7), "fc2.weight": (4, 6)}


def normal(key: str, *shape: int) -> torch.Tensor:
    return torch_normal(generator(SEED, key), *shape)


def problem(bias: str = "frozen") -> tuple[Task, Plan]:
    """7 -> 6 -> 4 with tanh, float64; the head is adapted as the other layer."""
    parts = {"fc1": nn.Linear(7, 6), "act": nn.Tanh(), "fc2": nn.Linear(6, 4)}
    model = nn.Sequential()
    for name, module in parts.items():
        model.add_module(name, module)
    model = model.double()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(normal(name, *parameter.shape) / 2)
    labels = torch.from_numpy(generator(SEED, "labels").integers(0, 4, SIZE))
    samples = Samples({"x": normal("x", SIZE, 7)}, labels)
    train = PartitionedData.of(samples, [np.arange(SIZE)])
    task = Task(model, ("fc2",), "cross_entropy", ("loss",), train, samples)
    return task, make_plan(model, ("fc2",), head_policy="lora", bias_policy=bias)


def preset(name: str, **changes: object) -> Method:
    group: dict[str, Any] = choice("method", name)
    wanted = {"rank": RANK, "alpha": ALPHA} | changes
    group |= {k: v for k, v in wanted.items() if k in group}
    return METHODS[group.pop("name")](**group)


def trained(
    method: Method, local: LocalConfig, rounds: int, bias: str = "frozen", clients: int = 1
) -> FedStrategy:
    """Run the one loop over one client (or over several that hold the same samples)."""
    task, plan = problem(bias)
    if clients > 1:
        assert isinstance(task.train, PartitionedData)
        train = PartitionedData.of(task.train.samples, [np.arange(SIZE)] * clients)
        task = replace(task, train=train)
    trainer = CohortTrainer(task, plan, local, seed=SEED, device=torch.device("cpu"))
    loop = LoopConfig(rounds, clients, clients, chunk=2, seed=SEED, dtype="float64")
    run = RoundsBuilder(method, trainer, loop, in_process()).ready()
    run.start()
    return run.strategy


def weights_of(strategy: FedStrategy) -> Tree:
    return strategy.method.weights(strategy.state, strategy.draw)


def batches() -> list[torch.Tensor]:
    return list(torch.arange(SIZE).split(BATCH))


def optimizer(local: LocalConfig, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    if local.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=local.lr, weight_decay=local.weight_decay)
    return torch.optim.SGD(parameters, lr=local.lr, momentum=local.momentum)


def sketch(kind: str, side: str, weight: str, index: int, normalize: str) -> torch.Tensor:
    m, n = SHAPES[weight]
    seed, dim = Draw(SEED).sketch_seed(weight), n if side == "right" else m
    return SketchSpec(kind, side, RANK, dim, seed, index, normalize=normalize).draw().clone()


@dataclass(frozen=True)
class Plain:
    """A chain method as a person would write it for one model: two matrices and an optimizer.

    Attributes:
        kind: Of the drawn factor.
        side: ``right``: A is drawn and B is zero, ``left``: the other way round.
        both: Whether the drawn factor is trained too.
        normalize: Of the drawing.
        every: Epochs of a link.
        moments: ``merge``: a new optimizer for each link; ``run``: one for all, whose parameters
            are written over; ``round``: a new one for each epoch.
    """

    kind: str
    side: str
    both: bool
    normalize: str
    every: int | None
    moments: str

    def train(self, local: LocalConfig, epochs: int) -> Tree:
        task, _ = problem()
        W = {n: p.detach().clone() for n, p in task.model.named_parameters()}
        assert isinstance(task.train, PartitionedData)
        x, y = task.train.samples.inputs["x"], task.train.samples.target
        pairs: dict[str, dict[str, torch.Tensor]] = {
            w: {"B": torch.zeros(m, RANK).double(), "A": torch.zeros(RANK, n).double()}
            for w, (m, n) in SHAPES.items()
        }
        drawn = "A" if self.side == "right" else "B"
        learnt = [p[k] for p in pairs.values() for k in p if self.both or k != drawn]
        for tensor in learnt:
            tensor.requires_grad_()
        scale = ALPHA / RANK
        optim = optimizer(local, learnt)
        for epoch in range(epochs):
            if epoch == 0 or (self.every and epoch % self.every == 0):
                with torch.no_grad():
                    for w, pair in pairs.items():
                        W[w] += scale * pair["B"] @ pair["A"]
                        index = epoch // self.every if self.every else 0
                        pair["B"].zero_(), pair["A"].zero_()
                        pair[drawn] += sketch(self.kind, self.side, w, index, self.normalize)
                if self.moments == "merge":
                    optim = optimizer(local, learnt)
            if self.moments == "round":
                optim = optimizer(local, learnt)
            for rows in batches():
                V = {w: W[w] + scale * p["B"] @ p["A"] for w, p in pairs.items()}
                hidden = torch.tanh(x[rows] @ V["fc1.weight"].T + W["fc1.bias"])
                output = hidden @ V["fc2.weight"].T + W["fc2.bias"]
                optim.zero_grad()
                nn.functional.cross_entropy(output, y[rows]).backward()
                optim.step()
        return W | {w: (W[w] + scale * p["B"] @ p["A"]).detach() for w, p in pairs.items()}


def assert_close(found: Tree, wanted: Tree) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)


LOCALS = pytest.mark.parametrize("local", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
SIDES = pytest.mark.parametrize("side", ["right", "left"])
LIVES = pytest.mark.parametrize("moments", ["round", "merge", "run"])


# What is drawn, whether both factors are trained, how it is normalized, and the rounds of a link.
PLAIN = {
    "lora": ("kaiming_uniform", True, "none", [None]),
    "cola": ("kaiming_uniform", True, "none", [1, 2]),
    "asymmetric_lora": ("orthonormal", False, "rows", [None]),
    "rac_lora": ("gaussian", False, "none", [1, 2]),
}


def drawing(name: str, side: str) -> dict[str, str]:
    """Say which factor is drawn, by the key of a method: A under a right sketch."""
    label = "B" if side == "right" else "A"
    return {"zero_init" if PLAIN[name][1] else "train": label}


LINKS = [(name, every) for name, (*_, links) in PLAIN.items() for every in links]


@LOCALS
@SIDES
@LIVES
@pytest.mark.parametrize(("name", "every"), LINKS)
def test_a_method_is_a_plain_loop(
    name: str, every: int | None, local: LocalConfig, side: str, moments: str
) -> None:
    kind, both, normalize, _ = PLAIN[name]
    plain = Plain(kind, side, both, normalize, every, moments)
    method = preset(name, **drawing(name, side), normalize=normalize, merge_every=every)
    found = trained(method, replace(local, optimizer_state=moments), rounds=5)
    assert_close(weights_of(found), plain.train(local, epochs=5))


@LOCALS
@pytest.mark.parametrize("moments", ["round", "run"])
def test_full_fine_tuning_is_a_plain_loop(local: LocalConfig, moments: str) -> None:
    task, _ = problem()
    assert isinstance(task.train, PartitionedData)
    samples = task.train.samples
    optim = optimizer(local, list(task.model.parameters()))
    for _ in range(4):
        if moments == "round":
            optim = optimizer(local, list(task.model.parameters()))
        for rows in batches():
            optim.zero_grad()
            output = task.model(samples.inputs["x"][rows])
            nn.functional.cross_entropy(output, samples.target[rows]).backward()
            optim.step()
    wanted = {n: p.detach() for n, p in task.model.named_parameters()}
    found = trained(preset("full"), replace(local, optimizer_state=moments), rounds=4, bias="full")
    assert_close(weights_of(found), wanted)


def split(name: str, side: str) -> tuple[Method, Method]:
    """A method whose link is one round, and the same in links of three rounds."""
    return (
        preset(name, **drawing(name, side), merge_every=1),
        preset(name, **drawing(name, side), merge_every=3),
    )


@LOCALS
@SIDES
@pytest.mark.parametrize("name", ["cola", "rac_lora"])
@pytest.mark.parametrize("clients", [1, 3])
def test_rounds_with_kept_moments_are_one_long_round(
    name: str, side: str, clients: int, local: LocalConfig
) -> None:
    """Three rounds of one epoch are one round of three; equal clients, so averaging is no change.

    In the stored order of samples: shuffles are keyed by the round.
    """
    whole, parts = split(name, side)
    long = trained(whole, replace(local, epochs=3), rounds=2, clients=clients)
    short = trained(parts, replace(local, optimizer_state="merge"), rounds=6, clients=clients)
    assert_close(weights_of(short), weights_of(long))
    reset = trained(parts, local, rounds=6, clients=clients)
    gaps = [(weights_of(reset)[n] - v).abs().max() for n, v in weights_of(long).items()]
    assert max(float(g) for g in gaps) > 1e-3, "the moments do not matter here"


def pruned(state: dict[str, Any], share: float) -> None:
    """ReLoRA's partial reset, with both moments of an entry kept or neither."""
    order = state["exp_avg"].flatten().abs().argsort(descending=True)
    for name in ("exp_avg", "exp_avg_sq"):
        flat = state[name].flatten()
        flat[order[round(share * flat.numel()) :]] = 0.0
        state[name].copy_(flat.reshape(state[name].shape))


def test_relora_keeps_the_largest_moments_and_the_count_of_steps() -> None:
    """A plain loop of two links, whose optimizer is pruned at the merge."""
    share, local = 0.25, replace(ADAMW, optimizer_state="merge", optimizer_state_kept=0.25)
    task, _ = problem()
    W = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    assert isinstance(task.train, PartitionedData)
    x, y = task.train.samples.inputs["x"], task.train.samples.target
    scale = ALPHA / RANK
    pairs = {w: (torch.zeros(m, RANK), torch.zeros(RANK, n)) for w, (m, n) in SHAPES.items()}
    learnt = [t.double().requires_grad_() for pair in pairs.values() for t in pair]
    optim = optimizer(local, learnt)
    for link in range(2):
        with torch.no_grad():
            for i, w in enumerate(SHAPES):
                B, A = learnt[2 * i : 2 * i + 2]
                W[w] += scale * B @ A
                B.zero_()
                A.copy_(sketch("kaiming_uniform", "right", w, link, "none"))
        for state in optim.state.values():
            pruned(state, share)
        for rows in batches() * 2:
            V = [W[w] + scale * learnt[2 * i] @ learnt[2 * i + 1] for i, w in enumerate(SHAPES)]
            output = torch.tanh(x[rows] @ V[0].T + W["fc1.bias"]) @ V[1].T + W["fc2.bias"]
            optim.zero_grad()
            nn.functional.cross_entropy(output, y[rows]).backward()
            optim.step()
    for i, w in enumerate(SHAPES):
        W[w] = (W[w] + scale * learnt[2 * i] @ learnt[2 * i + 1]).detach()
    found = trained(preset("relora", merge_every=2), local, rounds=4)
    assert_close(weights_of(found), W)


NAMES = ["cola", "rac_lora", "rolora", "bernoulli_lora", "xgblora", "B and A by turns"]


@dataclass(frozen=True)
class ByTurns(FedRacLora):
    """Fed-RAC-LoRA whose links train B and A by turns, as a user may write it."""

    def turn(self, state: State) -> FedRacLora:
        side = "left" if state.counters.sketch % 2 else "right"
        return FedRacLora(**vars(self) | {"train": "A" if side == "left" else "B"})

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        return self.turn(state).open_round(state, round_, cohort, draw)


def by_turns(every: int) -> Method:
    return ByTurns(rank=RANK, alpha=ALPHA, sketch="gaussian", merge_every=every)


@LOCALS
@pytest.mark.parametrize("clients", [1, 3])
def test_links_that_train_other_factors_begin_with_no_moments(
    clients: int, local: LocalConfig
) -> None:
    """A link of three rounds of one epoch is one round of three, B and A by turns."""
    long = trained(by_turns(1), replace(local, epochs=3), rounds=4, clients=clients)
    short = trained(
        by_turns(3), replace(local, optimizer_state="merge"), rounds=12, clients=clients
    )
    assert_close(weights_of(short), weights_of(long))
    reset = trained(by_turns(3), local, rounds=12, clients=clients)
    gaps = [(weights_of(reset)[n] - v).abs().max() for n, v in weights_of(long).items()]
    assert max(float(g) for g in gaps) > 1e-3, "the moments do not matter here"


def test_other_factors_under_one_link_are_an_error_that_names_the_first() -> None:
    """Of a method that gives its links no numbers: its moments are none of the next round's."""

    @dataclass(frozen=True)
    class Unnumbered(ByTurns):
        @override
        def open_round(
            self, state: State, round_: int, cohort: Cohort, draw: Draw
        ) -> RoundInstructions:
            return replace(super().open_round(state, round_, cohort, draw), link=0)

    method = Unnumbered(rank=RANK, alpha=ALPHA, merge_every=1)
    with pytest.raises(ClientError) as caught:
        trained(method, replace(ADAMW, optimizer_state="merge"), rounds=2)
    told = str(caught.value)
    assert "client 0: its tensors of round 1 differ" in told
    assert "fc1.weight/B (6, 2), wanted is moments/first/fc1.weight/A (2, 7)" in told
    assert "(4 of 6 tensors differ)" in told
    assert len(told) < 600


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_a_link_of_one_round_are_those_of_the_round(name: str) -> None:
    def make() -> Method:
        return by_turns(1) if "turns" in name else preset(name)

    found = trained(make(), replace(ADAMW, optimizer_state="merge"), rounds=5, clients=2)
    wanted = trained(make(), ADAMW, rounds=5, clients=2)
    assert found.recorder.ledger.digest() == wanted.recorder.ledger.digest()
    assert_close(weights_of(found), weights_of(wanted))
