"""What is trained as one batch and by the one-client loop: tasks of every kind of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from fedraclora.data.clients import PartitionedData
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.models.hf import build_gpt, build_transformer
from fedraclora.models.networks import build_cnn, build_mlp
from fedraclora.protocol.method import Plan
from fedraclora.protocol.plan import make_plan
from fedraclora.rng import generator
from tests import common

SEED = 11


SIZES = (5, 1, 9, 3, 4, 7)  # with batches of 4: 2, 1, 3, 1, 1 and 2 steps an epoch


WORDS, LENGTH = 20, 6


@dataclass(frozen=True)
class Case:
    """A task and the policy under which it is trained."""

    task: Task
    targets: str = "all-linear"
    head: str = "lora"
    bias: str = "full"
    dense: str | None = None

    def plan(self) -> Plan:
        return make_plan(
            self.task.model,
            self.task.head,
            target_modules=self.targets,
            head_policy=self.head,
            bias_policy=self.bias,
            modules_to_save=self.dense,
        )


normal = partial(common.normal, seed=SEED)


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
    data = PartitionedData.of(samples, parts)
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
    "mlp-averaged-head": lambda: Case(mlp(), head="full", bias="frozen"),
    "cnn-adapted": lambda: Case(cnn(), targets="all"),
    "cnn-full": lambda: Case(cnn(), dense="conv*"),
    "cnn-frozen": lambda: Case(cnn(), head="frozen"),
    "bert-query-value": lambda: Case(bert(), targets="query,value"),
    "bert-all-linear-norms": lambda: Case(bert(attention="eager"), dense="LayerNorm"),
    "bert-words": lambda: Case(bert(), targets="value", head="full", dense="word_embeddings"),
    "gpt2": lambda: Case(gpt2(), targets="c_attn,c_proj"),
    "gpt": lambda: Case(gpt(), head="full", dense="wte,wpe,*ln_?"),
    "reader": lambda: Case(reader(), dense="norm"),
}


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
