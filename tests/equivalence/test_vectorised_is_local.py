"""A chunk of clients trained as one batch comes to what the one-client loop gives each of them."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import override

from experiments.choices import choice
from fedraclora.adapter import make_plan
from fedraclora.aggregate import Uplinks
from fedraclora.errors import ConfigError, ModelError
from fedraclora.layers import LayerView
from fedraclora.local import train_one
from fedraclora.method import (
    Adapter,
    Cohort,
    Downlink,
    Draw,
    Factor,
    Frozen,
    Method,
    Plan,
    Sketched,
    Trained,
)
from fedraclora.models.cnn import build_cnn
from fedraclora.models.gpt import build_gpt
from fedraclora.models.hf import build_transformer
from fedraclora.models.mlp import build_mlp
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.rng import generator, torch_normal
from fedraclora.samples import Partitioned, Samples
from fedraclora.sampling import draw_cohort
from fedraclora.schema import bind
from fedraclora.sketch import SketchSpec
from fedraclora.task import IGNORED_TOKEN, Task
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.cohort_layers import CohortContext, CohortDropout
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.program import Program
from fedraclora.training.vmapped import masks_written_out
from fedraclora.tree import Layout, Tree
from strategies import METHODS
from strategies.fedavg import FedAvg

SEED = 11
ATOL = 1e-10
SIZES = (5, 1, 9, 3, 4, 7)  # with batches of 4: 2, 1, 3, 1, 1 and 2 steps an epoch
WORDS, LENGTH = 20, 6
KINDS = list({kind: name for name, kind in reversed(METHODS.items())}.values())  # one of a class
LOCAL = LocalConfig(lr=0.2, dense_lr=0.1, batch_size=4, epochs=2)


@dataclass(frozen=True)
class Case:
    """A task and the policy under which it is trained."""

    task: Task
    targets: str = "all-linear"
    head: str = "adapt"
    bias: str = "average"
    dense: str | None = None

    def plan(self) -> Plan:
        return make_plan(
            self.task.model,
            self.task.head,
            targets=self.targets,
            head_policy=self.head,
            bias_policy=self.bias,
            dense=self.dense,
        )


def normal(*shape: int, key: str = "x") -> torch.Tensor:
    return torch_normal(generator(SEED, key, *shape), *shape)


def task_of(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    target: torch.Tensor,
    *,
    head: tuple[str, ...] = (),
    loss: str = "cross_entropy",
    sizes: Sequence[int] = SIZES,
) -> Task:
    """A task in float64 whose weights are large enough for a wrong step to be seen."""
    wide = model.double()
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            shift = 1.0 if name.endswith("weight") and parameter.dim() == 1 else 0.0
            parameter.copy_(shift + 0.4 * normal(*parameter.shape, key=name))
    parts = list(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]))
    samples = Samples(inputs, target)
    data = Partitioned.of(samples, parts)
    return Task(wide, head, loss, ("loss",), data, samples)


def classes(count: int, total: int = sum(SIZES)) -> torch.Tensor:
    return torch.from_numpy(generator(SEED, "classes").integers(0, count, total))


def words(*, least: int = 0) -> torch.Tensor:
    drawn = generator(SEED, "words").integers(least, WORDS, (sum(SIZES), LENGTH))
    return torch.from_numpy(drawn)


def mlp(dropout: float = 0.0, sizes: Sequence[int] = SIZES) -> Task:
    built = build_mlp(shape=(7,), classes=3, seed=0, hidden=(6, 5), dropout=dropout)
    inputs = {"x": normal(sum(sizes), 7)}
    return task_of(built.model, inputs, classes(3, sum(sizes)), head=built.head, sizes=sizes)


def cnn() -> Task:
    built = build_cnn(shape=(2, 8, 8), classes=3, seed=0, channels=(3, 4), hidden=5)
    return task_of(built.model, {"x": normal(sum(SIZES), 2, 8, 8)}, classes(3), head=built.head)


def bert(dropout: float = 0.0, attention: str = "sdpa") -> Task:
    built = build_transformer(
        shape=(),
        classes=3,
        seed=0,
        hidden=8,
        layers=2,
        heads=2,
        intermediate=12,
        vocab=WORDS,
        max_length=LENGTH,
        dropout=dropout,
        attention=attention,
    )
    # No sample fills its length, so every batch is trimmed, and chunks trim differently.
    lengths = torch.from_numpy(generator(SEED, "lengths").integers(2, LENGTH, sum(SIZES)))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    inputs = {"input_ids": words(least=1), "attention_mask": mask}
    return task_of(built.model, inputs, classes(3), head=built.head)


def gpt2() -> Task:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=8,
        n_layer=2,
        n_head=2,
        num_labels=3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    inputs = {"input_ids": words(least=2)}
    return task_of(GPT2ForSequenceClassification(config), inputs, classes(3), head=("score",))


def gpt() -> Task:
    built = build_gpt(
        shape=(), classes=WORDS, seed=0, hidden=8, layers=2, heads=2, max_length=LENGTH
    )
    lengths = torch.from_numpy(generator(SEED, "lengths").integers(2, LENGTH, sum(SIZES)))
    mask = torch.arange(LENGTH) < lengths[:, None]
    ids = words()
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    target = torch.where(mask, ids, IGNORED_TOKEN)
    return task_of(built.model, inputs, target, head=built.head, loss="next_token")


class Reader(nn.Module):
    """A language model of one hidden layer; its head may share the table of words."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 5)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    @override
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        read: torch.Tensor = self.head(torch.tanh(self.mix(self.norm(self.words(index)))))
        return read


def reader(*, tied: bool = False) -> Task:
    index = words()
    target = index.clone()
    target[::2, 3:] = IGNORED_TOKEN  # clients differ in words, not only in samples
    return task_of(Reader(tied=tied), {"x": index}, target, head=("head",), loss="next_token")


class Scaled(nn.Module):
    """A linear layer between two bare parameters, which no layer kind serves."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 4)
        self.shift = nn.Parameter(torch.zeros(4))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.inner(torch.tanh(x * self.gain)) + self.shift
        return mixed


def scaled() -> Task:
    target = normal(sum(SIZES), 4, key="target")
    return task_of(Scaled(), {"x": normal(sum(SIZES), 6)}, target, loss="squared_error")


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(mlp()),
    "mlp-averaged-head": lambda: Case(mlp(), head="average", bias="frozen"),
    "cnn-adapted": lambda: Case(cnn(), targets="all"),
    "cnn-full": lambda: Case(cnn(), dense="conv*"),
    "cnn-frozen": lambda: Case(cnn(), head="frozen"),
    "bert-query-value": lambda: Case(bert(), targets="query,value"),
    "bert-all-linear-norms": lambda: Case(bert(attention="eager"), dense="LayerNorm"),
    "bert-words": lambda: Case(bert(), targets="value", head="average", dense="word_embeddings"),
    "gpt2": lambda: Case(gpt2(), targets="c_attn,c_proj"),
    "gpt": lambda: Case(gpt(), head="average", dense="wte,wpe,*ln_?"),
    "reader": lambda: Case(reader(), dense="norm"),
}


def method_of(name: str, **changes: object) -> Method:
    """The method as its YAML has it, but with alpha apart from a rank that fits small layers."""
    group = choice("method", name)
    wanted = {"rank": 3, "alpha": 2.0, **changes}
    return bind("method", METHODS, group | {k: v for k, v in wanted.items() if k in group})()


def base_of(task: Task) -> Tree:
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}


def trainer_of(task: Task, plan: Plan, local: LocalConfig) -> CohortTrainer:
    return CohortTrainer(task, plan, local, seed=SEED, device=torch.device("cpu"))


def assert_agrees(
    case: Case,
    plan: Plan,
    local: LocalConfig,
    base: Tree,
    downlink: Downlink,
    clients: torch.Tensor,
    *,
    round_: int = 1,
    rate_scale: float = 1.0,
    chunks: Sequence[int] = (2, len(SIZES)),
) -> Tree:
    """Hold the trainer, at every chunk size, against the oracle; give the trained tensors."""
    alone = [
        train_one(
            case.task,
            plan,
            local,
            base,
            downlink,
            client=client,
            place=place,
            round_=round_,
            seed=SEED,
            rate_scale=rate_scale,
        )
        for place, client in enumerate(clients.tolist())
    ]
    wanted = {n: torch.stack([tree[n] for tree, _ in alone]) for n in downlink.trained()}
    losses = torch.tensor([loss for _, loss in alone], dtype=torch.float64)
    trainer = trainer_of(case.task, plan, local)
    for size in chunks:
        for places in torch.arange(len(clients)).split(size):
            part = downlink.select(places)
            got = trainer.train(base, part, clients[places], round_=round_, rate_scale=rate_scale)
            assert got.trained.keys() == wanted.keys()
            for name, value in got.trained.items():
                gap = float((value - wanted[name][places]).abs().max())
                assert gap <= ATOL, f"{name} is off by {gap} in chunks of {size}"
            torch.testing.assert_close(got.losses, losses[places], rtol=0, atol=ATOL)
    return wanted


class Content(pickle.Pickler):
    """Writes tensors as their bytes: where equal ones lie in memory makes no difference."""

    @override
    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        return str, (value.numpy().tobytes(), str((value.shape, value.dtype)))

    @classmethod
    def digest(cls, value: object) -> bytes:
        file = io.BytesIO()
        pickler = cls(file)
        pickler.fast = True  # no references to what came before: equal is equal, shared or not
        pickler.dump(value)
        return hashlib.sha256(file.getvalue()).digest()


AGREED: dict[tuple[str, bytes], Tree] = {}


def agreed(name: str, case: Case, *given: Any, **more: Any) -> Tree:
    """`assert_agrees` for a case of this name, once for all methods that ask the same of it.

    Many send the same downlink in their first round, to the byte; a later round has factors of
    its own.
    """
    key = name, Content.digest((given, more))
    if key not in AGREED:
        AGREED[key] = assert_agrees(case, *given, **more)
    return AGREED[key]


def run(
    case: Case, method: Method, local: LocalConfig, rounds: int, check: set[int], name: str = ""
) -> None:
    """Run a method for some rounds and hold the rounds of ``check`` against the oracle.

    Args:
        case: What is trained.
        method: Of the run.
        local: How.
        rounds: How long.
        check: Rounds that are held against the oracle, and go on from what it gives.
        name: Of the case, if it is always the same under this name.
    """
    plan, draw = case.plan(), Draw(SEED)
    state = method.init(base_of(case.task), plan, draw)
    trainer = trainer_of(case.task, plan, local)
    for round_ in range(1, rounds + 1):
        clients = draw_cohort(SEED, round_, len(SIZES), 5)
        sent = method.open_round(state, round_, Cohort(clients, torch.ones(5)), draw)
        if round_ in check:
            holds = partial(agreed, name) if name else assert_agrees
            trained = holds(case, plan, local, state.base, sent, clients, round_=round_)
            assert all(float(t.abs().max()) > 1e-4 for t in trained.values())
        else:
            trained = trainer.train(
                state.base, sent, clients, round_=round_, rate_scale=1.0
            ).trained
        layout = Layout(tuple((n, s.shape) for n, s in sent.uploaded().items()))
        rows = layout.pack({n: trained[n] for n, _ in layout.shapes}, lead=1)
        weights = case.task.train.sizes(clients).to(torch.float64)
        state = method.close_round(state, sent, Uplinks(clients, weights, layout, rows))


# Every method on a model of each way to train, and what clients train on every model; the rest is
# for the long suite.
SHORT = {*product(KINDS, ("mlp", "cnn-adapted"))} | {*product(("fed_rac_lora", "fedavg"), CASES)}


@pytest.mark.short(when=lambda name, case: (name, case) in SHORT)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KINDS)
def test_every_method_on_every_model(name: str, case: str) -> None:
    run(CASES[case](), method_of(name), LOCAL, rounds=3, check={1, 3}, name=case)


@pytest.mark.parametrize("side", ["left", "auto"])
@pytest.mark.parametrize("model", ["mlp", "cnn-adapted", "bert-query-value"])
def test_a_sketch_on_either_side(model: str, side: str) -> None:
    method = method_of("fed_rac_lora", side=side, resample_every=2, sketch="gaussian")
    run(CASES[model](), method, LOCAL, rounds=2, check={2})


SETTINGS: dict[str, dict[str, object]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "decay": {"weight_decay": 0.05},
    "momentum-decay-clip": {"momentum": 0.9, "weight_decay": 0.05, "clip": 0.3},
    "clip": {"clip": 0.3},
    "prox": {"prox": 0.7},
    "prox-clip-momentum": {"prox": 0.7, "clip": 0.5, "momentum": 0.5},
    "dp": {"dp": SampleNoise(0.2, 0.5)},
    "dp-prox-momentum": {"dp": SampleNoise(0.1, 1.5), "prox": 0.7, "momentum": 0.5},
    "dp-adamw": {"dp": SampleNoise(0.5, 0.3), "optimiser": "adamw", "lr": 0.01},
    "dp-clip-only": {"dp": SampleNoise(0.05, 0.0)},
    "adamw": {"optimiser": "adamw", "lr": 0.01},
    "adamw-decay-clip": {"optimiser": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip": 0.5},
    "steps": {"steps": 7},
    "full-batch": {"batch_size": 0, "epochs": 3},
    "full-batch-steps": {"batch_size": 0, "steps": 4},
    "batch-of-one": {"batch_size": 1},
    "stored-order": {"shuffle": False},
    "one-rate": {"dense_lr": None},
}


# The short suite has each setting on B, on both factors and on whole weights, and those that meet
# most others on either factor in turn, a core between frozen factors, one of several heads and
# under a frozen factor of one's own.
WIDELY = {"fed_rac_lora", "fedavg_lora", "fedavg"}
ALSO = {"rolora", "fed_sb", "ravan", "flora_stacking", "fedkrso"}
MEETING = {
    "momentum-decay-clip",
    "prox-clip-momentum",
    "dp-prox-momentum",
    "adamw-decay-clip",
    "steps",
    "batch-of-one",
}


@pytest.mark.short(
    when=lambda name, setting: name in WIDELY or (name in ALSO and setting in MEETING)
)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", KINDS)
def test_every_local_setting(name: str, setting: str) -> None:
    local = replace(LOCAL, **SETTINGS[setting])  # type: ignore[arg-type]
    run(CASES["mlp"](), method_of(name, sketch="gaussian"), local, rounds=2, check={2})


PROJECTED: dict[str, dict[str, object]] = {
    "precondition": {"precondition": True},
    "precondition-prox-clip": {"precondition": True, "prox": 0.7, "clip": 0.5},
    "precondition-dp": {"precondition": True, "dp": SampleNoise(0.05, 0.0)},
}


PAIRED: dict[str, dict[str, object]] = {
    "riemannian": {"adjust": "riemannian", "damping": 0.05},
    "scaled-adamw": {"adjust": "riemannian", "optimiser": "adamw", "lr": 0.01},
    "riemannian-prox-clip": {"adjust": "riemannian", "prox": 0.7, "clip": 0.5, "momentum": 0.5},
    "lora-pro": {"adjust": "lora_pro", "damping": 0.05},
    "lora-pro-adamw": {"adjust": "lora_pro", "optimiser": "adamw", "lr": 0.01},
    "lora-pro-dp": {"adjust": "lora_pro", "damping": 0.05, "dp": SampleNoise(0.1, 0.3)},
    "lora-rite": {"optimiser": "lora_rite", "lr": 0.01, "eps": 1e-4},
    "lora-rite-decay-prox": {
        "optimiser": "lora_rite",
        "lr": 0.02,
        "weight_decay": 0.1,
        "prox": 0.7,
        "beta1": 0.5,
        "eps": 1e-3,  # at 1e-4 rounding grows to 1e-10 in two rounds
    },
}
PAIRED |= {
    "gates": {"gate_penalty": 1.5},
    "gates-momentum-decay-clip": {
        "gate_penalty": 0.7,
        "momentum": 0.8,
        "weight_decay": 0.05,
        "clip": 0.3,
    },
    "gates-adamw-prox": {"gate_penalty": 5.0, "optimiser": "adamw", "lr": 0.02, "prox": 0.7},
    "gates-dp": {"gate_penalty": 1.5, "dp": SampleNoise(0.1, 0.3)},
}
PAIRED_METHODS = {
    "both": ("fedavg_lora", {}),
    "both-left": ("fedavg_lora", {"side": "left"}),
    "both-far-from-zero": ("frlora", {}),
    "B": ("fed_rac_lora", {"sketch": "gaussian"}),
    "A": ("fed_rac_lora", {"sketch": "gaussian", "side": "left", "resample_every": None}),
    "in-turn": ("rolora", {}),
    "own-frozen-factors": ("flora_stacking", {}),
}


# Each setting on both factors, some of every kind on each choice of what is trained.
PAIRED_SHORT = {"riemannian-prox-clip", "lora-pro-dp", "lora-rite-decay-prox", "gates-adamw-prox"}


@pytest.mark.short(when=lambda trained, setting: trained == "both" or setting in PAIRED_SHORT)
@pytest.mark.parametrize("setting", PAIRED)
@pytest.mark.parametrize("trained", PAIRED_METHODS)
def test_optimisers_of_pairs_of_factors(trained: str, setting: str) -> None:
    name, changes = PAIRED_METHODS[trained]
    local = replace(LOCAL, **PAIRED[setting])  # type: ignore[arg-type]
    # A factor that begins at zero is soon all but singular at rank 3, and LoRA-RITE divides by it.
    method = method_of(name, **{"rank": 2} | changes)
    run(CASES["mlp"](), method, local, rounds=2, check={1, 2})


@pytest.mark.parametrize("setting", PROJECTED)
@pytest.mark.parametrize("trained", ["B", "A", "in-turn"])
def test_a_preconditioner_by_the_factor_that_is_frozen(trained: str, setting: str) -> None:
    # A gaussian sketch: with orthonormal rows the preconditioner would be the identity.
    name, changes = PAIRED_METHODS[trained]
    local = replace(LOCAL, **PROJECTED[setting])  # type: ignore[arg-type]
    run(CASES["mlp"](), method_of(name, **changes), local, rounds=2, check={1, 2})


@pytest.mark.parametrize("setting", ["riemannian", "lora-pro", "lora-rite"])
@pytest.mark.parametrize("case", ["cnn-adapted", "gpt2", "bert-query-value"])
def test_optimisers_of_pairs_on_other_layers(case: str, setting: str) -> None:
    local = replace(LOCAL, **PAIRED[setting] | {"lr": 0.01})  # type: ignore[arg-type]
    run(CASES[case](), method_of("fedavg_lora", rank=2), local, rounds=1, check={1})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg"])
def test_gradients_of_samples_on_every_model(name: str, case: str) -> None:
    local = replace(LOCAL, dp=SampleNoise(0.2, 0.5))
    run(CASES[case](), method_of(name), local, rounds=2, check={2})


def test_gradients_of_samples_under_dropout() -> None:
    local = replace(LOCAL, dp=SampleNoise(0.2, 0.5))
    run(Case(mlp(dropout=0.4), targets="all-linear"), method_of("fed_rac_lora"), local, 2, {2})


@pytest.mark.parametrize("side", ["right", "left"])
def test_preconditioner_and_prox_on_either_side(side: str) -> None:
    local = replace(LOCAL, precondition=True, prox=0.3)
    method = method_of("fed_rac_lora", side=side, sketch="gaussian", resample_every=None)
    run(CASES["cnn-adapted"](), method, local, rounds=2, check={2})


def test_the_schedule_scales_both_rates() -> None:
    case = CASES["mlp"]()
    method, plan = method_of("fed_rac_lora"), case.plan()
    state = method.init(base_of(case.task), plan, Draw(SEED))
    clients = torch.arange(len(SIZES))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    slow = assert_agrees(case, plan, LOCAL, state.base, sent, clients, rate_scale=0.25)
    lower = replace(LOCAL, lr=0.25 * 0.2, dense_lr=0.25 * 0.1)
    same = assert_agrees(case, plan, lower, state.base, sent, clients)
    for name, value in slow.items():
        torch.testing.assert_close(value, same[name], rtol=0, atol=ATOL)


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"steps": 0}])
def test_no_step_changes_nothing(setting: dict[str, int]) -> None:
    case = CASES["mlp"]()
    method, plan = method_of("fedavg_lora"), case.plan()
    state = method.init(base_of(case.task), plan, Draw(SEED))
    clients = torch.arange(len(SIZES))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    local = replace(LOCAL, **setting)  # type: ignore[arg-type]
    kept = assert_agrees(case, plan, local, state.base, sent, clients)
    start = sent.trained()["fc1.weight/A"].opening()
    assert start is not None
    assert torch.equal(kept["fc1.weight/A"][2], start)


@pytest.mark.parametrize("model", ["mlp", "bert"])
@pytest.mark.parametrize("name", KINDS)
def test_dropout_has_the_same_masks(name: str, model: str) -> None:
    task = mlp(dropout=0.4) if model == "mlp" else bert(dropout=0.3)
    case = Case(task, targets="all-linear" if model == "mlp" else "query,value")
    known = f"{model} with dropout"
    run(case, method_of(name), LOCAL, rounds=2, check={2}, name=known)


def test_dropout_is_on() -> None:
    plain, dropped = Case(mlp()), Case(mlp(dropout=0.4))
    method, plan, clients = method_of("fed_rac_lora"), plain.plan(), torch.arange(len(SIZES))
    state = method.init(base_of(plain.task), plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    with_, without = (
        trainer_of(c.task, plan, LOCAL).train(state.base, sent, clients, round_=1, rate_scale=1.0)
        for c in (dropped, plain)
    )
    assert not torch.allclose(with_.losses, without.losses, atol=1e-3)


def test_masks_are_drawn_anew_for_each_client_step_round_layer_and_seed() -> None:
    inner, ones = nn.Dropout(0.25), torch.ones(2 * 50, 40)
    places: list[dict[str, int]] = [{}, {"step": 1}, {"round_": 1}, {"seed": 1}]
    masks = []
    for place in places:
        context = CohortContext(active=2, rows=100, clients=torch.tensor([3, 4]), **place)  # type: ignore[arg-type]
        masks += [CohortDropout(inner, layer, context)(ones) for layer in ("a", "b")]
    apart = [half for mask in masks for half in mask.chunk(2)]
    for i, mask in enumerate(apart):
        assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
        assert abs(float(mask.mean()) - 1) < 0.05
        assert not any(torch.equal(mask, other) for other in apart[:i])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("sizes", [(1,), (9,), (1, 1, 1), (12, 1)])
def test_one_client_and_clients_of_one_sample(sizes: tuple[int, ...], name: str) -> None:
    case = Case(mlp(sizes=sizes))
    method, plan = method_of(name), case.plan()
    clients = torch.arange(len(sizes))
    state = method.init(base_of(case.task), plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(sizes))), Draw(SEED))
    agreed(f"mlp of {sizes}", case, plan, LOCAL, state.base, sent, clients)


def test_results_come_in_the_order_that_was_asked() -> None:
    case = CASES["mlp"]()
    method, plan = method_of("fedavg_lora"), case.plan()
    state = method.init(base_of(case.task), plan, Draw(SEED))
    clients = torch.tensor([4, 0, 5, 2, 1, 3])
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    assert_agrees(case, plan, LOCAL, state.base, sent, clients)
    trial = trainer_of(case.task, plan, LOCAL).train(
        state.base, sent, clients, round_=1, rate_scale=1.0
    )
    assert trial.samples.tolist() == [SIZES[c] for c in clients.tolist()]
    assert trial.steps.tolist() == [2 * -(-SIZES[c] // 4) for c in clients.tolist()]


# ---- Factors that no method of the table sends yet: per client, three of them -------------------


def factor_of(form: str, *shape: int, key: str) -> Factor:
    """A factor of one of the forms of the contract, shared or one per client."""
    K = len(SIZES)
    if form == "zero":
        return Trained(shape)
    if form == "start":
        return Trained(shape, 0.4 * normal(*shape, key=key))
    if form == "starts":
        return Trained(shape, 0.4 * normal(K, *shape, key=key))
    if form == "frozen":
        return Frozen(0.4 * normal(*shape, key=key))
    if form == "own":
        return Frozen(0.4 * normal(K, *shape, key=key))
    rank, dim = sorted(shape)
    side = "right" if shape == (rank, dim) else "left"
    return Sketched(SketchSpec("gaussian", side, rank, dim, 5, 0))


def trained_in(forms: tuple[str, ...]) -> int:
    """How many factors of an adapter are trained."""
    return sum(form in {"zero", "start", "starts"} for form in forms)


FORMS = [
    ("start", "sketched"),
    ("starts", "sketched"),
    ("starts", "own"),
    ("start", "own"),
    ("zero", "own"),
    ("own", "starts"),
    ("own", "start"),
    ("frozen", "starts"),
    ("sketched", "starts"),
    ("starts", "starts"),
    ("start", "starts"),
    ("own", "zero", "own"),
    ("own", "starts", "frozen"),
    ("frozen", "start", "sketched"),
    ("sketched", "starts", "own"),
    ("starts", "own", "starts"),
]
LAYERS: dict[str, tuple[Callable[[], Task], tuple[str, ...]]] = {
    "linear": (mlp, ("fc1.weight", "fc2.weight")),
    "conv": (cnn, ("conv1.weight", "conv2.weight")),
    "conv1d": (gpt2, ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight")),
    "square conv1d": (gpt2, ("transformer.h.0.attn.c_proj.weight",)),
    "embedding": (reader, ("words.weight",)),
}


def adapters_of(
    forms: tuple[str, ...], names: tuple[str, ...], views: dict[str, LayerView]
) -> dict[str, Adapter]:
    labels = ("B", "A") if len(forms) == 2 else ("B", "M", "A")
    adapters = {}
    for name in names:
        m, n = views[name].shape
        edges = [m, 2, n] if len(forms) == 2 else [m, 2, 3, n]
        factors = {
            label: factor_of(form, edges[i], edges[i + 1], key=f"{name}/{label}")
            for i, (label, form) in enumerate(zip(labels, forms, strict=True))
        }
        adapters[name] = Adapter(factors, 0.7)
    return adapters


@pytest.mark.parametrize("forms", FORMS, ids="-".join)
@pytest.mark.parametrize("kind", LAYERS)
def test_factors_of_every_form(kind: str, forms: tuple[str, ...]) -> None:
    make, names = LAYERS[kind]
    case = Case(make(), targets=",".join(n.removesuffix(".weight") for n in names), head="adapt")
    plan = case.plan()
    downlink = Downlink(adapters_of(forms, names, plan.targets))
    clients = torch.arange(len(SIZES))
    assert_agrees(case, plan, LOCAL, base_of(case.task), downlink, clients)


@pytest.mark.parametrize("forms", [f for f in FORMS if len(f) == 2], ids="-".join)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_prox_and_preconditioner_with_factors_of_every_form(
    kind: str, forms: tuple[str, ...]
) -> None:
    make, names = LAYERS[kind]
    case = Case(make(), targets=",".join(n.removesuffix(".weight") for n in names), head="average")
    plan = case.plan()
    dense = {n: Trained(plan.shapes[n], main=False) for n in plan.dense}
    downlink = Downlink(adapters_of(forms, names, plan.targets), dense)
    local = replace(LOCAL, lr=0.02, prox=0.4, precondition=trained_in(forms) == 1, momentum=0.5)
    assert_agrees(case, plan, local, base_of(case.task), downlink, torch.arange(len(SIZES)))


def test_dense_tensors_may_start_at_each_client() -> None:
    case = Case(reader(), dense="norm")
    plan, K = case.plan(), len(SIZES)
    dense = {
        name: Trained(shape, 0.4 * normal(K, *shape, key=name), main=False)
        for name, shape in plan.shapes.items()
    }
    base, local = base_of(case.task), replace(LOCAL, prox=0.4)
    assert_agrees(case, plan, local, base, Downlink(dense=dense), torch.arange(K))


def test_prox_refuses_three_factors() -> None:
    case = Case(mlp(), targets="fc1")
    plan = case.plan()
    downlink = Downlink(adapters_of(("own", "zero", "own"), ("fc1.weight",), plan.targets))
    trainer = trainer_of(case.task, plan, replace(LOCAL, prox=0.1))
    with pytest.raises(ConfigError, match=r"prox.*'M'"):
        trainer.train(base_of(case.task), downlink, torch.arange(2), round_=1, rate_scale=1.0)


# ---- Convolutions of every shape ----------------------------------------------------------------


def convolution(**arguments: object) -> Task:
    settings = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments}
    model = nn.Sequential(
        nn.Conv2d(**settings),  # type: ignore[arg-type]
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
    return task_of(model, {"x": normal(sum(SIZES), 4, 7, 6)}, classes(3), head=("4",))


CONVOLUTIONS: dict[str, dict[str, object]] = {
    "stride": {"stride": (2, 1), "padding": 1},
    "oblong": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": (0, 1)},
    "same": {"padding": "same", "bias": False},
    "point": {"kernel_size": 1},
}


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("name", KINDS)
def test_convolutions_of_every_shape(name: str, shape: str) -> None:
    run(Case(convolution(**CONVOLUTIONS[shape]), targets="all"), method_of(name), LOCAL, 2, {2})


def test_a_grouped_convolution_is_trained_in_full() -> None:
    case = Case(convolution(groups=2), dense="0")
    run(case, method_of("fed_rac_lora"), LOCAL, rounds=2, check={2})


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rank", [3, 4])  # 4: two groups of 2, so that shapes fit by chance
@pytest.mark.parametrize("unusual", [{"groups": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_an_unusual_convolution_is_right_or_refused(
    unusual: dict[str, object], rank: int, name: str
) -> None:
    case = Case(convolution(**unusual), targets="all")
    refused = ""
    try:
        run(case, method_of(name, rank=rank), LOCAL, rounds=1, check={1})
    except ModelError as error:
        refused = str(error)
    assert not refused or "Conv2d" in refused


# ---- What cannot be folded into a batch ---------------------------------------------------------


def foldable(case: Case, downlink: Downlink) -> bool:
    return Program.build(case.task, downlink, torch.device("cpu")).folded


@pytest.mark.parametrize("local", [LOCAL, replace(LOCAL, prox=0.3, momentum=0.9, clip=0.5)])
def test_tied_weights_fall_back_to_vmap(local: LocalConfig) -> None:
    case = Case(reader(tied=True), targets="mix", head="frozen", dense="norm")
    method = method_of("fedavg")
    plan = case.plan()
    state = method.init(base_of(case.task), plan, Draw(SEED))
    cohort = Cohort(torch.arange(2), torch.ones(2))
    assert not foldable(case, method.open_round(state, 1, cohort, Draw(SEED)))
    run(case, method, local, rounds=2, check={2})


@pytest.mark.parametrize("name", [n for n, k in METHODS.items() if not issubclass(k, FedAvg)])
def test_tied_weights_that_stay_frozen_are_folded(name: str) -> None:
    case = Case(reader(tied=True), targets="mix", head="frozen", dense="norm")
    method = method_of(name)
    plan = case.plan()
    state = method.init(base_of(case.task), plan, Draw(SEED))
    cohort = Cohort(torch.arange(2), torch.ones(2))
    assert foldable(case, method.open_round(state, 1, cohort, Draw(SEED)))
    run(case, method, LOCAL, rounds=2, check={2})


def test_a_head_that_shares_the_table_of_words_is_not_trained_apart() -> None:
    with pytest.raises(ModelError, match=r"head.weight is tied to words.weight.*head=frozen"):
        Case(reader(tied=True), targets="mix").plan()


@pytest.mark.parametrize("name", METHODS)
def test_bare_parameters_fall_back_to_vmap(name: str) -> None:
    case, method = Case(scaled(), targets="inner", dense="gain,shift"), method_of(name)
    plan = case.plan()
    state = method.init(base_of(case.task), plan, Draw(SEED))
    cohort = Cohort(torch.arange(2), torch.ones(2))
    assert not foldable(case, method.open_round(state, 1, cohort, Draw(SEED)))
    local = replace(LOCAL, precondition=name in {"fed_rac_lora", "ffa_lora", "rolora"})
    run(case, method, local, rounds=2, check={2}, name="scaled")


CAUSAL = {("llama", "sdpa"), ("gpt2", "sdpa")}  # in the short suite


def causal(kind: str, attention: str = "sdpa") -> Case:
    """A causal model of transformers on padded texts: a classifier, or one of the next token."""
    import transformers

    lengths = torch.from_numpy(generator(SEED, "lengths").integers(2, LENGTH, sum(SIZES)))
    mask = torch.arange(LENGTH) < lengths[:, None]
    inputs = {"input_ids": words(least=2) * mask, "attention_mask": mask.long()}
    common = {"vocab_size": WORDS, "num_labels": 3, "pad_token_id": 0, "bos_token_id": None}
    common |= {"eos_token_id": None, "attn_implementation": attention}
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if kind == "gpt2":
        sizes = {"n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**common, **sizes, **still))
        target = torch.where(mask, inputs["input_ids"], IGNORED_TOKEN)
        task = task_of(tied, inputs, target, head=("lm_head",), loss="next_token")
        return Case(task, head="frozen")
    if kind == "mistral":  # a window shorter than the text
        config = transformers.MistralConfig(**common, **small, head_dim=4, sliding_window=2)
        model: nn.Module = transformers.MistralForSequenceClassification(config)
    else:
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**common, **small)
        )
    return Case(task_of(model, inputs, classes(3), head=("score",)), head="average")


@pytest.mark.short(when=lambda kind, attention: (kind, attention) in CAUSAL)
@pytest.mark.parametrize("name", ["fedavg", "fedavg_lora"])
@pytest.mark.parametrize(
    ("kind", "attention"),
    [("llama", "sdpa"), ("gpt2", "sdpa"), ("mistral", "sdpa"), ("llama", "eager")],
)
def test_causal_models_train_as_one_batch(
    name: str, kind: str, attention: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = causal(kind, attention)
    norms = "ln_1,ln_2,ln_f" if kind == "gpt2" else "*norm"
    if name != "fedavg":
        case = replace(case, dense=norms)
    run(case, method_of(name), LOCAL, rounds=2, check={2})
    assert not caplog.records  # not one client after another


def test_the_masks_of_transformers_are_its_own_again() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as TABLE

    before = TABLE["sdpa"], TABLE["eager"]
    with masks_written_out():
        assert not {TABLE["sdpa"], TABLE["eager"]} & {*before}
    assert (TABLE["sdpa"], TABLE["eager"]) == before


class Choosy(nn.Module):
    """Looks at its data to decide what to do, which torch.func.vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 4)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.gain
        x = nn.functional.dropout(x, 0.5, self.training)  # which no seed would fix: it stays off
        mixed: torch.Tensor = self.inner(x if bool((x * x).sum() >= 0) else -x)
        return mixed


@pytest.mark.parametrize("dp", [None, SampleNoise(0.2, 0.5)])
def test_what_vmap_cannot_run_trains_one_client_after_another(
    dp: SampleNoise | None, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(Choosy().train(), {"x": normal(sum(SIZES), 6)}, classes(4))
    case = Case(task, targets="inner", dense="gain")
    run(case, method_of("fedavg_lora"), replace(LOCAL, dp=dp), rounds=1, check={1})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # of one trainer, once
    assert said[0].startswith("Choosy cannot train several clients as one batch")


def test_an_error_of_the_model_is_not_taken_for_one_of_vmap() -> None:
    case = Case(scaled(), targets="inner", dense="gain")
    narrow = replace(case.task.train.samples, inputs={"x": normal(sum(SIZES), 5)})
    case = replace(case, task=replace(case.task, train=replace(case.task.train, samples=narrow)))
    downlink = Downlink(dense={"gain": Trained((6,))})
    trainer = trainer_of(case.task, case.plan(), LOCAL)
    with pytest.raises(RuntimeError, match="must match the size"):
        trainer.train(base_of(case.task), downlink, torch.arange(2), round_=1, rate_scale=1.0)


@pytest.mark.parametrize(
    "forms", [("own", "starts"), ("starts", "sketched"), ("own", "zero", "own")]
)
def test_factors_of_each_client_under_vmap(forms: tuple[str, ...]) -> None:
    case = Case(scaled(), targets="inner", dense="gain")
    plan = case.plan()
    dense = {"gain": Trained((6,), 1 + 0.1 * normal(len(SIZES), 6, key="gain"))}
    downlink = Downlink(adapters_of(forms, ("inner.weight",), plan.targets), dense)
    assert not foldable(case, downlink)
    assert_agrees(case, plan, LOCAL, base_of(case.task), downlink, torch.arange(len(SIZES)))


def test_dropout_under_vmap_is_refused_by_the_layer_s_name() -> None:
    task = scaled()
    model = nn.Sequential()
    model.add_module("body", task.model)
    model.add_module("hole", nn.Dropout(0.5))
    case = Case(replace(task, model=model), targets="body.inner", dense="body.gain")
    plan = case.plan()
    downlink = Downlink(dense={"body.gain": Trained((6,))})
    trainer = trainer_of(case.task, plan, LOCAL)
    with pytest.raises(ModelError, match="hole"):
        trainer.train(base_of(case.task), downlink, torch.arange(2), round_=1, rate_scale=1.0)


def test_batch_norm_is_refused_by_the_layer_s_name() -> None:
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(7, 6))
    model.add_module("middle", nn.BatchNorm1d(6))
    model.add_module("fc2", nn.Linear(6, 3))
    task = task_of(model, {"x": normal(sum(SIZES), 7)}, classes(3), head=("fc2",))
    plan = Case(task).plan()
    with pytest.raises(ModelError, match=r"'middle' \(BatchNorm1d\)"):
        trainer_of(task, plan, LOCAL)


@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg"])
def test_batch_norm_with_fixed_statistics_is_served(name: str) -> None:
    norm = nn.BatchNorm1d(6).eval()
    norm.running_mean, norm.running_var = normal(6, key="mean"), normal(6, key="var").square()
    model = nn.Sequential(nn.Linear(7, 6), norm, nn.Tanh(), nn.Linear(6, 3))
    task = task_of(model, {"x": normal(sum(SIZES), 7)}, classes(3), head=("3",))
    run(Case(task), method_of(name), LOCAL, rounds=2, check={2})


def test_batch_norm_without_statistics_of_its_own_is_refused() -> None:
    # In evaluation mode too, it has nothing but the batch to normalise by.
    layer = nn.BatchNorm1d(6, track_running_stats=False).eval()
    model = nn.Sequential(nn.Linear(7, 6), layer, nn.Tanh(), nn.Linear(6, 3))
    task = task_of(model, {"x": normal(sum(SIZES), 7)}, classes(3), head=("3",))
    with pytest.raises(ModelError, match="BatchNorm1d"):
        trainer_of(task, Case(task).plan(), LOCAL)


class TimeFirst(nn.Module):
    """Mixes along [time, samples, width]: the first axis is not that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.mix(x.transpose(0, 1)))
        read: torch.Tensor = self.head(mixed.mean(dim=0))
        return read


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_that_does_not_see_samples_first_is_right_or_refused(name: str) -> None:
    task = task_of(TimeFirst(), {"x": normal(sum(SIZES), 6, 5)}, classes(3), head=("head",))
    refused = ""
    try:
        run(Case(task), method_of(name), LOCAL, rounds=1, check={1})
    except ModelError as error:
        refused = str(error)
    assert not refused or "mix" in refused


@pytest.mark.parametrize("layer", [nn.Dropout2d, nn.AlphaDropout])
def test_dropout_of_another_kind_is_on_or_refused(layer: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), layer(0.9), nn.Flatten())
    model.add_module("fc", nn.Linear(3 * 36, 3))
    inputs = {"x": normal(sum(SIZES), 2, 8, 8)}
    case = Case(task_of(model, inputs, classes(3), head=("fc",)), targets="all")
    method, plan, clients = method_of("fed_rac_lora"), case.plan(), torch.arange(len(SIZES))
    state = method.init(base_of(case.task), plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    refused, losses = "", []
    try:
        for training in (True, False):
            trainer = trainer_of(replace(case.task, model=model.train(training)), plan, LOCAL)
            trial = trainer.train(state.base, sent, clients, round_=1, rate_scale=1.0)
            losses.append(trial.losses)
    except ModelError as error:
        refused = str(error)
    assert layer.__name__ in refused or not torch.allclose(losses[0], losses[1])


class Attentive(nn.Module):
    """A layer that drops values inside, as a function of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.wide = nn.Linear(4, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.wide(self.attention(x, x, x)[0].mean(dim=1))))


def test_dropout_inside_a_layer_is_refused() -> None:
    """It would be off without a word: no mask of it can be keyed by client and step."""
    for dropout in (0.0, 0.5):
        model = Attentive(dropout)
        task = task_of(model, {"x": normal(sum(SIZES), 6, 4)}, classes(3), head=("fc",))
        plan = Case(task, targets="wide").plan()
        if not dropout:
            trainer_of(task, plan, LOCAL)
            continue
        with pytest.raises(ModelError, match=r"layer 'attention' .*set its dropout to 0"):
            trainer_of(task, plan, LOCAL)


@pytest.mark.parametrize("name", METHODS)
def test_layers_of_other_kinds_fall_back_to_vmap(name: str) -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )
    task = task_of(model, {"x": normal(sum(SIZES), 3, 5)}, classes(3), head=("4",))
    case = Case(task, dense="0,1")
    run(case, method_of(name), LOCAL, rounds=2, check={2}, name="other kinds")
