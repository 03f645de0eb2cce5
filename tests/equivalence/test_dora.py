"""DoRA: whole rounds against plain autograd on the paper's weight, and batches against the loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_ranks
import torch
import torch.nn.functional as F
from test_precision import gap, single
from test_precision import trained as trained_in
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D
from typing_extensions import override
from vectorized_agreement import LOCAL, base_of, foldable, method_of, run, trainer_of
from vectorized_cases import CASES, SEED, SIZES, Case, classes, convolution, normal, reader, task_of
from vectorized_settings import MEETING, PAIRED, SETTINGS

from fedraclora.data.clients import PartitionedData
from fedraclora.protocol.method import Cohort, Draw, RoundInstructions
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.precision import BF16_MIXED, FLOAT32
from fedraclora.tree import Layout, Tree

COHORT = Cohort(torch.arange(len(SIZES)), torch.tensor(SIZES, dtype=torch.float64))


def dora(name: str, **changes: Any) -> Dora:
    return Dora(method_of(name, **changes))


# ---- Against plain autograd: one model for each client, no code of the project in the steps ------


class Turned(nn.Module):
    """``m (W + s B A) / ||W + s B A||``, the norm of each output a constant (section 4.3)."""

    def __init__(self, B: torch.Tensor, A: torch.Tensor, m: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.B, self.A, self.m = (nn.Parameter(t.clone()) for t in (B, A, m))
        self.scale, self.turned = scale, False

    @override
    def forward(self, stored: torch.Tensor) -> torch.Tensor:
        W = stored.T if self.turned else stored.flatten(1)
        V = W + self.scale * self.B @ self.A
        found = self.m[:, None] * V / V.norm(dim=1, keepdim=True).detach()
        return found.T if self.turned else found.reshape(stored.shape)


def conv1d() -> Case:
    model = nn.Sequential(Conv1D(5, 7), nn.Tanh(), Conv1D(3, 5))
    return Case(task_of(model, {"x": normal(sum(SIZES), 7)}, classes(3)), bias="frozen")


def frozen(name: str) -> Case:
    return replace(CASES[name](), bias="frozen")


PLAIN: dict[str, Callable[[], Case]] = {
    "linear": lambda: frozen("mlp"),
    "conv": lambda: frozen("cnn-adapted"),
    "conv1d": conv1d,
}
STEPS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
SAME: dict[str, dict[str, object]] = {
    "sgd": {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
}


def trained_alone(case: Case, start: Tree, scales: dict[str, float], client: int, how: str) -> Tree:
    """What one client makes of ``<layer>.B, .A, .m``; A stays where its name is ``A!``."""
    model = copy.deepcopy(case.task.model).requires_grad_(requires_grad=False)
    parts, leaves = {}, {}
    for layer, scale in scales.items():
        A = f"{layer}.A!" if f"{layer}.A!" in start else f"{layer}.A"
        part = Turned(start[f"{layer}.B"], start[A], start[f"{layer}.m"], scale)
        part.A.requires_grad_(requires_grad=not A.endswith("!"))
        module = model.get_submodule(layer)
        part.turned = isinstance(module, Conv1D)
        parametrize.register_parametrization(module, "weight", part)
        parts[layer] = part
        leaves |= {f"{layer}.B": part.B, A: part.A, f"{layer}.m": part.m}
    optimizer = STEPS[how]([p for p in leaves.values() if p.requires_grad])
    data = case.task.train
    assert isinstance(data, PartitionedData)
    samples = data.gather(torch.tensor([client]), torch.arange(SIZES[client])[None])
    for _ in range(2):
        for rows in torch.arange(SIZES[client]).split(4):
            optimizer.zero_grad()
            F.cross_entropy(model(samples.inputs["x"][rows]), samples.target[rows]).backward()
            optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def started(sent: RoundInstructions, base: Tree) -> tuple[Tree, dict[str, float]]:
    """Where factors begin, from the message, and magnitudes, from the weights; and the scales."""
    start: Tree = {}
    scales = {}
    for weight, adapter in sent.adapters.items():
        layer = weight.removesuffix(".weight")
        scales[layer] = adapter.scale
        for label, factor in adapter.factors.items():
            if not factor.trained:
                start[f"{layer}.{label}!"] = factor.draw()
            else:
                opening = factor.opening()
                zero = torch.zeros(factor.shape, dtype=torch.float64)
                start[f"{layer}.{label}"] = zero if opening is None else opening
        stored = base[weight]
        lengths = stored.norm(dim=0) if layer in {"0", "2"} else stored.flatten(1).norm(dim=1)
        start[f"{layer}.m"] = lengths
    return start, scales


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("name", ["fedavg_lora", "ffa_lora"])
@pytest.mark.parametrize("kind", PLAIN)
def test_rounds_are_those_of_plain_autograd(kind: str, name: str, how: str) -> None:
    case, method, draw = PLAIN[kind](), dora(name), Draw(SEED)
    local = LocalSettings(batch_size=4, epochs=2, shuffle=False, **SAME[how])  # type: ignore[arg-type]
    plan, base = case.plan(), base_of(case.task)
    trainer = trainer_of(case.task, plan, local)
    state = method.initial_state(base, plan, draw)
    start, scales = started(method.open_round(state, 1, COHORT, draw), base)
    assert set(scales.values()) == {2.0 / 3}  # alpha is not the rank
    for round_ in (1, 2):
        sent = method.open_round(state, round_, COHORT, draw)
        result = trainer.train(state.base, sent, COHORT.clients, round_=round_, rate_scale=1.0)
        layout = Layout(tuple((n, s.shape) for n, s in sent.uploaded().items()))
        rows = layout.pack(result.trained, lead=1)
        got = Uplinks(COHORT.clients, result.samples.double(), layout, rows)
        state = method.close_round(state, sent, got)
        each = [trained_alone(case, start, scales, k, how) for k in range(len(SIZES))]
        share = COHORT.weights / COHORT.weights.sum()
        start = {
            n: sum(p * tree[n] for p, tree in zip(share, each, strict=True))  # type: ignore[misc]
            for n in start
        }
    model = copy.deepcopy(case.task.model)
    weights = method.weights(state, draw)
    for layer, scale in scales.items():
        A = start.get(f"{layer}.A", start.get(f"{layer}.A!"))
        assert A is not None
        part = Turned(start[f"{layer}.B"], A, start[f"{layer}.m"], scale)
        part.turned = isinstance(model.get_submodule(layer), Conv1D)
        wanted = part(base[f"{layer}.weight"]).detach()
        torch.testing.assert_close(
            state.carried[f"{layer}.magnitude"], start[f"{layer}.m"], rtol=0, atol=1e-10
        )
        torch.testing.assert_close(weights[f"{layer}.weight"], wanted, rtol=0, atol=1e-10)
        assert float((wanted - base[f"{layer}.weight"]).abs().max()) > 1e-2
        moved = start[f"{layer}.m"] - started(sent, base)[0][f"{layer}.m"]
        assert float(moved.abs().max()) > 1e-3


# ---- A batch of clients against the one-client loop ----------------------------------------------


# Conv1D of GPT-2 is a linear layer that is transposed, and vmap trains what `gpt` has.
@pytest.mark.short(when=lambda name, case: name == "fedavg_lora" or case == "mlp")
@pytest.mark.parametrize("case", ["mlp", "cnn-adapted", "bert-query-value", "gpt2", "gpt"])
@pytest.mark.parametrize("name", ["fedavg_lora", "ffa_lora"])
def test_a_batch_is_the_loop_on_every_kind_of_layer(name: str, case: str) -> None:
    run(CASES[case](), dora(name), LOCAL, rounds=2, check={1, 2})


@pytest.mark.parametrize("name", ["rolora", "fed_sb", "ravan", "fedsa_lora", "fedsvd"])
def test_a_batch_is_the_loop_for_factors_of_every_form(name: str) -> None:
    run(CASES["mlp"](), dora(name), LOCAL, rounds=2, check={1, 2})


@pytest.mark.parametrize("bias", ["full", "frozen"])
@pytest.mark.parametrize("train", ["A", "auto"])
def test_either_side_and_biases_of_both_kinds(train: str, bias: str) -> None:
    case = replace(CASES["cnn-adapted"](), bias=bias)
    run(case, dora("ffa_lora", train=train, sketch="gaussian"), LOCAL, rounds=2, check={1, 2})


STEPPED = {n: s for n, s in (SETTINGS | PAIRED).items() if "prox" not in s}


@pytest.mark.short(when=lambda setting: setting in MEETING)
@pytest.mark.parametrize("setting", STEPPED)
def test_every_local_setting(setting: str) -> None:
    local = replace(LOCAL, **STEPPED[setting])  # type: ignore[arg-type]
    run(CASES["mlp"](), dora("fedavg_lora", rank=2), local, rounds=2, check={1, 2})


@pytest.mark.parametrize("unusual", [{"groups": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_layers_that_fall_back_to_vmap(unusual: dict[str, object]) -> None:
    case, method = Case(convolution(**unusual), targets="all"), dora("fedavg_lora", rank=2)
    state = method.initial_state(base_of(case.task), case.plan(), Draw(SEED))
    assert not foldable(case, method.open_round(state, 1, COHORT, Draw(SEED)))
    run(case, method, LOCAL, rounds=2, check={2})


def test_a_model_with_tied_weights_beside_what_is_adapted() -> None:
    case, method = Case(reader(tied=True), targets="mix", head="frozen"), dora("fedavg_lora")
    state = method.initial_state(base_of(case.task), case.plan(), Draw(SEED))
    assert foldable(case, method.open_round(state, 1, COHORT, Draw(SEED)))
    run(case, method, LOCAL, rounds=2, check={2})


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "hetlora"])
def test_rank_budgets(name: str) -> None:
    """The lengths are those of whole rows, of components beyond the budget, too."""
    test_ranks.run(CASES["mlp"](), dora(name), LOCAL, rounds=3, check={1, 3})


@pytest.mark.parametrize("name", ["mlp", "cnn-adapted", "gpt2"])
def test_bf16_mixed_is_near(name: str) -> None:
    case, method = single(CASES[name]()), dora("fedavg_lora")
    base = base_of(case.task)
    state = method.initial_state(base, case.plan(), Draw(SEED))
    sent = method.open_round(state, 1, COHORT, Draw(SEED))
    wide, mixed = (trained_in(case, base, sent, p).trained for p in (FLOAT32, BF16_MIXED))
    start = {n: base.get(n, s.opening()) for n, s in sent.trained().items()}
    begun = {n: torch.zeros(()) if t is None else t for n, t in start.items()}
    assert 0 < gap(mixed, wide, begun) < 0.05
