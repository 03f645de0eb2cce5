"""What the benchmark trains: models, data and local work, each fixed by numbers alone.

Every client makes one local epoch of plain SGD over its samples, in their order, and every
client is in the cohort of every round: nothing is drawn, so that whoever does the same work must
end at the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedraclora.models import MODELS
from fedraclora.rng import generator
from fedraclora.samples import Partitioned, Samples
from fedraclora.task import Task

LR = 0.1
OURS = ("vectorised", "central", "inline", "idle", "fedavg", "loop")
PEERS = ("flower", "pfl", "fedlab", "fedjax")


@dataclass(frozen=True)
class Workload:
    """A model, and the local work of each client.

    Attributes:
        what: In a few words.
        clients: All of them take part in every round.
        rounds: Counted rounds of each row; the first round is not counted.
        model: Builds the network.
        data: Builds the samples of so many clients of so many samples, in client order.
        head: Name of the final layer.
        rows: Who is timed.
        rank: Of every adapter.
        samples: Of each client.
        batch: Samples of a local step.
    """

    what: str
    clients: int
    rounds: int
    model: Callable[[], nn.Module]
    data: Callable[[int, int], Samples]
    head: str
    rows: tuple[str, ...]
    rank: int = 4
    samples: int = 50
    batch: int = 10

    @property
    def steps(self) -> int:
        """Local steps of a client."""
        return self.samples // self.batch

    def task(self, device: torch.device) -> Task:
        """Build the task."""
        samples = self.data(self.clients, self.samples)
        parts = np.split(np.arange(len(samples)), self.clients)
        data = Partitioned.of(samples, parts).to(device)
        few = samples.take(torch.arange(2)).to(device)
        model = self.model().to(device)
        return Task(model, (self.head,), "cross_entropy", ("accuracy",), data, few)


def vectors(width: int, classes: int) -> Callable[[int, int], Samples]:
    """Make non-IID data: each client's inputs are shifted its own way, labels are noisy.

    Args:
        width: Numbers per input.
        classes: Labels, those of one linear teacher.
    """

    def make(clients: int, each: int) -> Samples:
        draw = generator(0, "bench", "vectors")
        teacher = draw.standard_normal((width, classes), dtype=np.float32)
        shift = 0.5 * draw.standard_normal((clients, 1, width), dtype=np.float32)
        x = draw.standard_normal((clients, each, width), dtype=np.float32) + shift
        noise = 2.0 * draw.gumbel(size=(clients, each, classes))
        y = (x @ teacher + noise).argmax(axis=-1)
        inputs = torch.from_numpy(x.reshape(-1, width))
        return Samples({"x": inputs}, torch.from_numpy(y.reshape(-1).astype(np.int64)))

    return make


def tokens(vocabulary: int, length: int, classes: int) -> Callable[[int, int], Samples]:
    """Make token ids and labels, all of them uniform."""

    def make(clients: int, each: int) -> Samples:
        draw = generator(0, "bench", "tokens")
        ids = torch.from_numpy(draw.integers(0, vocabulary, (clients * each, length)))
        y = torch.from_numpy(draw.integers(0, classes, clients * each))
        return Samples({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, y)

    return make


def mlp(width: int, hidden: int, classes: int) -> Callable[[], nn.Module]:
    """Build a two-layer perceptron ``fc1``, ``relu1``, ``fc2``."""
    return lambda: MODELS["mlp"](shape=(width,), classes=classes, seed=0, hidden=[hidden]).model


def minilm() -> nn.Module:
    """Build a network of MiniLM's shape (6 layers, width 384) with random weights."""
    return MODELS["transformer"](
        shape=(),
        classes=2,
        seed=0,
        hidden=384,
        layers=6,
        heads=12,
        intermediate=1536,
        vocab=30522,
        max_length=512,
    ).model


SMALL = (mlp(64, 128, 10), vectors(64, 10), "fc2")
WORKLOADS = {
    "A": Workload("100 clients, MLP 64-128-10", 100, 15, *SMALL, (*OURS, *PEERS)),
    "B": Workload(
        "100 clients, MLP 784-1024-10",
        100,
        8,
        mlp(784, 1024, 10),
        vectors(784, 10),
        "fc2",
        (*OURS, *PEERS),
    ),
    "C": Workload("1,000 clients, MLP 64-128-10", 1000, 6, *SMALL, (*OURS, *PEERS)),
    "minilm": Workload(
        "16 clients, transformer of 6 layers and width 384, 32 tokens",
        16,
        3,
        minilm,
        tokens(30522, 32, 2),
        "classifier",
        ("vectorised", "central", "idle"),
        samples=12,
        batch=4,
    ),
    "cohort": Workload(
        "MLP 64-128-10, cohorts of 1,000 and 10,000",
        1000,
        5,
        *SMALL,
        ("cohort 1,000", "cohort 10,000"),
    ),
}
