"""What the benchmark trains: models, data and local work, each fixed by numbers alone.

Every client makes one local epoch of plain SGD over its samples, in their order, and every
client is in the cohort of every round: nothing is drawn, so that whoever does the same work must
end at the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from fedraclora.data.clients import ClientData, PartitionedData
from fedraclora.data.locate import package_path
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.data.sources.virtual import virtual
from fedraclora.data.task import Task
from fedraclora.models import MODELS
from fedraclora.protocol.method import Plan
from fedraclora.protocol.plan import make_plan
from fedraclora.rng import generator

LR = 0.1
RAY = ("ray idle", "ray x1", "ray x2")
PEERS = ("flower", "pfl", "fedlab", "fedjax")
PRODUCTS = ("product", "product bf16")


@dataclass(frozen=True)
class Workload:
    """A model, and the local work of each client.

    Attributes:
        what: In a few words.
        clients: Size of the population.
        rounds: Counted rounds of each row; the first round is not counted.
        model: Builds the network.
        data: Builds so many clients of so many samples.
        head: Name of the final layer.
        rows: Who is timed.
        rank: Of every adapter.
        samples: Of each client.
        batch: Samples of a local step.
        asked: Clients of a round; None asks all of them.
        ray_chunk: Clients that a Ray worker trains as one batch.
        loss: A key of `fedraclora.data.task.LOSSES`; with ``next_token`` the head, which is tied
            to the table of tokens, is frozen.
        apart: Whether the memory of each row is that of a process of its own.
    """

    what: str
    clients: int
    rounds: int
    model: Callable[..., nn.Module]
    data: Callable[[int, int], ClientData]
    head: str
    rows: tuple[str, ...]
    rank: int = 4
    samples: int = 50
    batch: int = 10
    asked: int | None = None
    ray_chunk: int | str = "auto"
    loss: str = "cross_entropy"
    apart: bool = False

    @property
    def cohort(self) -> int:
        """Clients of a round."""
        return self.clients if self.asked is None else self.asked

    @property
    def steps(self) -> int:
        """Local steps of a client."""
        return self.samples // self.batch

    def task(self, device: torch.device) -> Task:
        """Build the task."""
        data = self.data(self.clients, self.samples).to(device)
        first = torch.zeros(1, dtype=torch.int64, device=device)
        few = data.gather(first, torch.arange(2, device=device)[None])
        model = self.model().to(device)
        return Task(model, (self.head,), self.loss, ("loss",), data, few)


@dataclass(frozen=True)
class Case:
    """A workload on a device; its data are built once, when a row asks for them.

    Attributes:
        workload: What is done.
        device: Where.
        alone: Whether a single row has the task, whose model it may change.
    """

    workload: Workload
    device: torch.device
    alone: bool = False

    @cached_property
    def task(self) -> Task:
        """The task that the rows share."""
        return self.workload.task(self.device)

    @property
    def model(self) -> nn.Module:
        """A model for a row that changes it: a copy where other rows begin from the task's."""
        return self.task.model if self.alone else copy.deepcopy(self.task.model)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all texts without padding; 0 where the samples are no texts."""
        found = self.task.train.table
        lengths = None if found is None else found[0].lengths
        return 0 if lengths is None else int(lengths.sum())

    def of(self, clients: int) -> Case:
        """The same with another population."""
        return replace(self, workload=replace(self.workload, clients=clients))


def divided(samples: Samples, clients: int) -> PartitionedData:
    """Divide samples evenly among clients, in the order of the samples."""
    return PartitionedData.of(samples, np.split(np.arange(len(samples)), clients))


def vectors(width: int, classes: int, clients: int, each: int) -> PartitionedData:
    """Make non-IID data: each client's inputs are shifted its own way, labels are noisy.

    Args:
        width: Numbers per input.
        classes: Labels, those of one linear teacher.
        clients: How many there are.
        each: Samples of a client.
    """
    draw = generator(0, "bench", "vectors")
    teacher = draw.standard_normal((width, classes), dtype=np.float32)
    shift = 0.5 * draw.standard_normal((clients, 1, width), dtype=np.float32)
    x = draw.standard_normal((clients, each, width), dtype=np.float32) + shift
    noise = 2.0 * draw.gumbel(size=(clients, each, classes))
    y = (x @ teacher + noise).argmax(axis=-1)
    inputs = torch.from_numpy(x.reshape(-1, width))
    target = torch.from_numpy(y.reshape(-1).astype(np.int64))
    return divided(Samples({"x": inputs}, target), clients)


def tokens(vocabulary: int, length: int, classes: int, clients: int, each: int) -> PartitionedData:
    """Make token ids and labels, all of them uniform."""
    draw = generator(0, "bench", "tokens")
    ids = torch.from_numpy(draw.integers(0, vocabulary, (clients * each, length)))
    y = torch.from_numpy(draw.integers(0, classes, clients * each))
    return divided(Samples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, y), clients)


def texts(
    vocabulary: int, length: int, classes: int | None, clients: int, each: int
) -> PartitionedData:
    """Make texts of a quarter of ``length`` to all of it, padded, of uniform tokens.

    Args:
        vocabulary: Number of different tokens.
        length: Tokens of the longest text.
        classes: Labels, one a text; None: the second half of each text is what is learnt.
        clients: How many there are.
        each: Texts of a client.
    """
    draw = generator(0, "bench", "texts")
    count = clients * each
    lengths = torch.from_numpy(draw.integers(length // 4, length + 1, (count, 1)))
    place = torch.arange(length)
    mask = (place < lengths).long()
    ids = torch.from_numpy(draw.integers(0, vocabulary, (count, length))) * mask
    if classes is None:
        target = torch.where(2 * place >= lengths, ids, IGNORED_TOKEN)
        target = torch.where(mask > 0, target, IGNORED_TOKEN)
    else:
        target = torch.from_numpy(draw.integers(0, classes, count))
    return divided(Samples({"input_ids": ids, "attention_mask": mask}, target), clients)


def population(width: int, classes: int, clients: int, each: int) -> ClientData:
    """Make clients whose samples come into being when they are asked for."""
    parts = virtual(
        clients=clients, samples=each, sizes="constant", features=width, classes=classes
    ).parts
    if parts is None or isinstance(parts, list):
        raise TypeError(f"virtual clients came as {type(parts).__name__}")
    return parts


def network(
    name: str, classes: int, shape: Sequence[int] = (), package: str | None = None, **sizes: Any
) -> nn.Module:
    """Build a model by its name and sizes.

    Args:
        name: A key of `MODELS`.
        classes: Outputs.
        shape: Of an input; of none where it is a text.
        package: Where it is installed, the classifier in its folder ``model`` is taken instead.
        sizes: What else the model is called with.
    """
    folder = None if package is None else package_path(package, "model")
    if folder is not None:
        return MODELS["hf"](shape=(), classes=classes, seed=0, path=str(folder)).model
    return MODELS[name](shape=tuple(shape), classes=classes, seed=0, **sizes).model


def all_linear_plan(task: Task, bias: str = "frozen") -> Plan:
    """Adapt all linear layers; a head that is tied to the table of tokens stays frozen."""
    head = "frozen" if task.loss == "next_token" else "lora"
    return make_plan(task.model, task.head, head_policy=head, bias_policy=bias)


DATA_KINDS = {kind.__name__: kind for kind in (vectors, tokens, texts, population)}


def workload(model: Any, data: list[Any], rows: list[str], **rest: Any) -> Workload:
    """Read an entry of ``workloads.yaml``: arguments of `network`, data by kind and its numbers."""
    samples = partial(DATA_KINDS[data[0]], *data[1:])
    return Workload(model=partial(network, **model), data=samples, rows=tuple(rows), **rest)


TABLE = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
WORKLOADS = {name: workload(**entry) for name, entry in yaml.safe_load(TABLE).items()}
